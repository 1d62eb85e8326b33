"""Encode documents into an index, or what is new or changed since. After a kill, the same command continues."""

import argparse

from metaembed_jax.flags import count, local_path, model_name
from metaembed_jax.hosts.failures import fail_together
from metaembed_jax.hosts.votes import stop_signal
from metaembed_jax.inputs.image_flags import add_image_flag
from metaembed_jax.retrieval import index_and_search
from metaembed_jax.retrieval.manifest import DTYPES, EXACT_DTYPES
from metaembed_jax.startup import add_device_flags, add_host_flags, add_mesh_flags, mesh_sizes, start

EXAMPLES = """
  metaembed index --model=runs/tiny --input=FOLDER --out=INDEX         a folder of images and PDF files
  metaembed index --model=runs/tiny --input=rows.jsonl --out=INDEX --budget=16 --dtype=int8
  metaembed index --model=runs/7b --input=FOLDER --out=INDEX           on every host of a slice; all share FOLDER and INDEX
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("--model", type=model_name, required=True, help="a run, a Hugging Face directory, or a hub id")
    parser.add_argument("--input", type=local_path, required=True, help="a folder of images and PDF files, or a .jsonl or .parquet")
    parser.add_argument(
        "--out", type=local_path, required=True, help="the index; one of the same model, budget and types follows the input"
    )
    parser.add_argument("--budget", type=int, help="vectors to keep of each document (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the vectors on disk (default: bfloat16)")
    parser.add_argument(
        "--exact", choices=EXACT_DTYPES, help="with --dtype=int8: also keep the vectors in this type, for `search --certified`"
    )
    parser.add_argument("--skip", type=count, default=0, help="most documents to leave out if they cannot be read (default: 0)")
    add_image_flag(parser)
    add_device_flags(parser)
    add_mesh_flags(parser)
    add_host_flags(parser)


def run(arguments: argparse.Namespace) -> None:
    """Build an index."""
    start(arguments)
    with fail_together(), stop_signal() as stop, stop.at_once():
        index_and_search.index(
            arguments.model,
            arguments.input,
            arguments.out,
            arguments.budget,
            arguments.dtype,
            arguments.exact,
            arguments.skip,
            mesh_sizes(arguments),
        )
