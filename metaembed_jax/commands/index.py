"""Encode documents into an index. After a kill, the same command continues."""

import argparse

from metaembed_jax.flags import local_path, model_name
from metaembed_jax.retrieval import index_and_search
from metaembed_jax.retrieval.manifest import DTYPES
from metaembed_jax.startup import add_device_flags, start

EXAMPLES = """
  metaembed index --model=runs/tiny --input=FOLDER --out=INDEX         a folder of images and PDF files
  metaembed index --model=runs/tiny --input=rows.jsonl --out=INDEX --budget=16 --dtype=int8
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("--model", type=model_name, required=True, help="a run, a Hugging Face directory, or a hub id")
    parser.add_argument("--input", type=local_path, required=True, help="a folder of images and PDF files, or a .jsonl or .parquet")
    parser.add_argument("--out", type=local_path, required=True, help="the index; an existing one is replaced at the end")
    parser.add_argument("--budget", type=int, help="vectors to keep of each document (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the vectors on disk (default: bfloat16)")
    add_device_flags(parser)


def run(arguments: argparse.Namespace) -> None:
    """Build an index."""
    start(arguments)
    index_and_search.index(arguments.model, arguments.input, arguments.out, arguments.budget, arguments.dtype)
