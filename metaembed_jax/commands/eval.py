"""Evaluate the best checkpoint of a run on its test split, or on a benchmark."""

import argparse

from metaembed_jax.config.files import load_config
from metaembed_jax.evaluation.benchmarks import FOLDERS
from metaembed_jax.evaluation.evaluate_checkpoint import evaluate_checkpoint
from metaembed_jax.flags import add_config, any_path, local_path
from metaembed_jax.hosts.failures import fail_together
from metaembed_jax.hosts.votes import stop_signal
from metaembed_jax.inputs.image_flags import add_image_flag
from metaembed_jax.startup import add_device_flags, add_host_flags, start

EXAMPLES = """
  metaembed eval --config=tiny --checkpoint=runs/tiny --budgets=1:1,4:8,16:64
  metaembed eval --config=7b --checkpoint=runs/7b --benchmark=mmeb --from=MMEB-eval
  metaembed eval --config=7b --checkpoint=runs/7b --benchmark=vidore --budgets="1:1,1:1:1000>16:64"
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add_config(parser)
    parser.add_argument("--checkpoint", type=any_path, required=True, help="a run; its best checkpoint is read")
    parser.add_argument(
        "--out", type=any_path, help="the folder for results.json, quality.png and report.html (default: <checkpoint>/eval)"
    )
    parser.add_argument(
        "--budgets",
        help="pairs r_q:r_c, such as 1:1,4:8,16:64, with a width 16:64x32 (default: the trained ones); for mteb also stages, "
        "1:1:1000>16:64",
    )
    names = "; ".join([*FOLDERS, "vidore, or any benchmark or task of mteb"])
    parser.add_argument("--benchmark", help=f"{names} (default: the test split)")
    folders = "; ".join(f"for --benchmark={name}, {files}" for name, (*_, files) in FOLDERS.items())
    parser.add_argument("--from", dest="files", type=local_path, help=folders)
    add_image_flag(parser)
    add_device_flags(parser)
    add_host_flags(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the table of the best checkpoint, and write its results."""
    start(arguments)
    with fail_together(), stop_signal() as stop, stop.at_once():
        config = load_config(arguments.config, arguments.overrides)
        out = arguments.out or arguments.checkpoint / "eval"
        evaluate_checkpoint(config, arguments.checkpoint, out, arguments.budgets, arguments.benchmark, arguments.files)
