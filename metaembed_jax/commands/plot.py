"""Draw quality against budget of several runs in one picture."""

import argparse
from pathlib import Path

from metaembed_jax.evaluation import report
from metaembed_jax.files import write_bytes
from metaembed_jax.flags import any_path

EXAMPLES = """
  metaembed plot runs/tiny/results.json runs/boards/results.json --out=quality.png
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("results", type=any_path, nargs="+", help="results.json of `metaembed train` or `eval`, one a line")
    parser.add_argument("--out", type=any_path, default=Path("quality.png"), help="the picture (default: quality.png)")


def run(arguments: argparse.Namespace) -> None:
    """Write the picture."""
    runs = [report.read_results(path) for path in arguments.results]
    write_bytes(arguments.out, report.picture([(results["config"]["name"], results) for results in runs]))
    print(f"written: {arguments.out}")
