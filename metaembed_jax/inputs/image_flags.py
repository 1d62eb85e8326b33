"""The flag of every command that reads images: their memory limit."""

import argparse
import os

from metaembed_jax.flags import argument_errors
from metaembed_jax.inputs.images import MEMORY_KEY, MEMORY_MIB, parse_mib


def add_image_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag `--image-mib`, which `limit_images` reads."""
    parser.add_argument(
        "--image-mib",
        type=_mib,
        metavar="N",
        help="the most memory of a decoded image, in MiB; a larger JPEG is decoded smaller, another image is an error "
        f"(default: {MEMORY_MIB}, 134 megapixels; sets {MEMORY_KEY}, which worker processes read)",
    )


def limit_images(arguments: argparse.Namespace) -> None:
    """Set the memory limit of images in this process and its workers by the flag, if it is given."""
    if arguments.image_mib is not None:
        os.environ[MEMORY_KEY] = str(arguments.image_mib)


def _mib(text: str) -> int:
    with argument_errors():
        return parse_mib(text)
