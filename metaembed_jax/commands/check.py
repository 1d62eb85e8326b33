"""Compare what this machine's devices compute with references, and time it. Exit code 1: they differ."""

import argparse
import sys

from metaembed_jax.check import run_check
from metaembed_jax.config.files import load_config
from metaembed_jax.errors import UserError
from metaembed_jax.flags import add_config
from metaembed_jax.startup import add_device_flags, start

EXAMPLES = """
  metaembed check                                                      three minutes
  metaembed check --config=3b --only=step                              a training step of a config
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add_config(parser, required=False)
    parser.add_argument("--only", default="", metavar="WORDS", help="run the lines whose name contains this")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout, and the table on stderr")
    add_device_flags(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the table of the checks."""
    start(arguments)
    if arguments.overrides and not arguments.config:
        raise UserError(f"--config.{next(iter(arguments.overrides))} changes a config; add --config=NAME")
    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    if not run_check.check(config, arguments.only, arguments.json):
        sys.exit(1)
