"""Draw quality against budget of several runs in one picture."""

import argparse
from pathlib import Path

from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.plots import draw_results
from metaembed_jax.files import write_bytes
from metaembed_jax.flags import any_path
from metaembed_jax.results import read_results

EXAMPLES = """
  metaembed plot runs/tiny/results.json runs/boards/results.json --out=quality.png
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("results", type=any_path, nargs="+", help="results.json of `metaembed train` or `eval`, one for each line")
    parser.add_argument("--out", type=any_path, default=Path("quality.png"), help="the picture (default: quality.png)")


def run(arguments: argparse.Namespace) -> None:
    """Write the picture."""
    plot = draw_results([read_results(path) for path in arguments.results])
    if plot is None:
        raise UserError("nothing to plot: all searches are in stages; expected results at plain budgets")
    write_bytes(arguments.out, plot)
    print(f"written: {arguments.out}")
