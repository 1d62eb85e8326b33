"""`python -m metaembed_jax COMMAND`: what is neither training nor evaluation."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from metaembed_jax.data import sources
from metaembed_jax.flags import run_main


def main(argv: Sequence[str]) -> None:
    """Flags in, one call out."""
    parser = argparse.ArgumentParser(prog="python -m metaembed_jax", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="write a source as ArrayRecord, where training and evaluation read it")
    prepare.add_argument("--source", required=True, help=f"one of {', '.join(sources.SOURCES)}")
    prepare.add_argument("--out", type=Path, default=Path("data"), help="the folder of all sources (default: data)")
    arguments = parser.parse_args(argv)
    marker = sources.prepare(arguments.source, arguments.out)
    print(f"{arguments.out / arguments.source}: " + ", ".join(f"{key} {value}" for key, value in marker.items()))


def run() -> None:
    """The entry point."""
    run_main(main)
