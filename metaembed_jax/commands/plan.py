"""Memory, FLOPs, traffic and time of a run on a TPU slice, from the TPU's compiler; needs no TPU. Exit code 1: it does not fit."""

import argparse
import sys

from metaembed_jax.config.files import load_config
from metaembed_jax.flags import add_config
from metaembed_jax.planning import print_plan
from metaembed_jax.retrieval.manifest import DTYPES

EXAMPLES = """
  metaembed plan --config=7b --topology=v5p:2x2x2                      two slices: 2xv5e:4x4
  metaembed plan --config=7b --topology=v6e:8x8 --search               the mesh and microbatch that train fastest
  metaembed plan --config=7b --topology=v5e:2x4 --what=search --items=1_000_000 --budget="1:1:1000>16:64"
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add_config(parser)
    parser.add_argument("--topology", required=True, help="the slice, such as v5e:2x4, or slices, such as 2xv5e:2x4")
    parser.add_argument("--what", choices=("train", "encode", "search"), default="train", help="the program (default: train)")
    parser.add_argument("--search", action="store_true", help="find the mesh and microbatch that train fastest")
    search = parser.add_argument_group("of --what=search", "an index whose vectors are in the devices' memory")
    search.add_argument("--items", type=int, help="documents of the index (default: 100,000)")
    search.add_argument("--vectors", type=int, help="vectors of a document (default: the config's)")
    search.add_argument("--width", type=int, help="numbers of a vector (default: the config's)")
    search.add_argument("--dtype", choices=DTYPES, help="of the stored vectors (default: bfloat16)")
    search.add_argument("--queries", type=int, help="searched at once (default: 32)")
    search.add_argument("--budget", help="such as 4:8, 4:8x32 (32 numbers of a vector) or 1:1:1000>16:64 (default: all vectors)")
    search.add_argument("-k", type=int, help="documents to return (default: 10)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Print a plan."""
    config = load_config(arguments.config, arguments.overrides)
    has_mesh = any(key.startswith("mesh.") for key in arguments.overrides)
    flags = ("items", "vectors", "width", "dtype", "queries", "budget", "k")
    index_options = {flag: value for flag in flags if (value := getattr(arguments, flag)) is not None}
    if not print_plan.plan(config, arguments.topology, arguments.what, arguments.search, arguments.json, has_mesh, index_options):
        sys.exit(1)
