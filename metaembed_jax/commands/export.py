"""Write a trained model for transformers, sentence-transformers or peft."""

import argparse

from metaembed_jax.checkpoints.export import FORMATS, export
from metaembed_jax.flags import any_path, model_name
from metaembed_jax.startup import add_device_flags, start

EXAMPLES = """
  metaembed export --checkpoint=runs/7b --format=transformers --out=exported
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("--checkpoint", type=model_name, required=True, help="a run, or a Hugging Face directory")
    parser.add_argument("--out", type=any_path, required=True, help="an empty or new folder")
    parser.add_argument("--format", required=True, choices=tuple(FORMATS), help="the library to write for")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the tensors (default: the dtype of training)")
    add_device_flags(parser)


def run(arguments: argparse.Namespace) -> None:
    """Export a model."""
    start(arguments)
    export(arguments.checkpoint, arguments.out, arguments.format, arguments.dtype)
    print(f"written: {arguments.out}")
