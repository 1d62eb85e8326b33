"""Memory, FLOPs, traffic and time of a run on a TPU slice, from the TPU's compiler; needs no TPU. Exit code 1: it does not fit."""

import argparse
import sys

from metaembed_jax.config.files import load_config
from metaembed_jax.flags import add_config
from metaembed_jax.planning import print_plan

EXAMPLES = """
  metaembed plan --config=7b --topology=v5p:2x2x2                      two slices: 2xv5e:4x4
  metaembed plan --config=7b --topology=v6e:8x8 --search               the mesh and microbatch that train fastest
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add_config(parser)
    parser.add_argument("--topology", required=True, help="the slice, such as v5e:2x4, or slices, such as 2xv5e:2x4")
    parser.add_argument("--what", choices=("train", "encode", "search"), default="train", help="the program (default: train)")
    parser.add_argument("--search", action="store_true", help="find the mesh and microbatch that train fastest")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Print a plan."""
    config = load_config(arguments.config, arguments.overrides)
    has_mesh = any(key.startswith("mesh.") for key in arguments.overrides)
    if not print_plan.plan(config, arguments.topology, arguments.what, arguments.search, arguments.json, has_mesh):
        sys.exit(1)
