"""Images of any format, upright and in RGB, read alike by preparation, training, indexing, evaluation and search.

The memory of an image is limited. The limit is of the decoded pixels; formats whose decoders hold further copies (WebP, AVIF,
JPEG 2000), turning and conversion take up to four times as much for a moment. Threads that encode wait for each other, so that
their images together have no more than the limit (`encoding.reading`); other processes read one image at a time.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from metaembed_jax.errors import UserError, one_line
from metaembed_jax.inputs.image_formats import QUARTER_TURNS, TURNS, has_late_exif, identify, open_file, orientation

MEMORY_KEY = "METAEMBED_IMAGE_MIB"  # environment variable, so that worker processes have it: the most memory of a decoded image
MEMORY_MIB = 512  # its default: 134 megapixels
PIXEL_BYTES = 4  # of a decoded pixel, which Pillow pads
STRIP_PIXELS = 2**22  # that are converted at once
MAX_ASPECT_RATIO = 200  # some families refuse images beyond it, so preparation does
WIDTH, HEIGHT = 0x0100, 0x0101  # tags of a TIFF
JPEG_SCALES = (1, 2, 4, 8)  # by which its decoder can divide a size
METADATA = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # that say an orientation


def open_image(image: bytes | str | Path | Image.Image, name: str, frame: int = 0) -> Image.Image:
    """Decode an image to RGB, upright; an open RGB image is returned itself.

    Pixels are those of `transformers.image_utils.load_image`, with these differences: 16 bits of grey are scaled to 8, where Pillow
    clips them to white; transparency is composited onto white (as `transformers.image_transforms.convert_to_rgb`); a JPEG over the
    memory limit is decoded at a half, a quarter or an eighth of its size. Metadata that cannot be parsed is ignored. Encoded bytes
    and files are turned upright, open images are not. An animation gives its first frame.

    Args:
      frame: of a TIFF, from `tiff_pages`.

    Raises:
      UserError: the image is unreadable, truncated or empty, or exceeds the memory limit (checked before decoding).
    """
    with image_errors(name):
        if isinstance(image, Image.Image):
            check_size(image, name)
            return _to_rgb(image)
        with open_file(image) as file:
            opened = open_header(file, name, frame)
            turn = orientation(opened, has_late_exif(file))
            opened.load()
            if turn in TURNS and not isinstance(opened, TiffImageFile):  # Pillow turns a TIFF while it decodes it
                opened = opened.transpose(TURNS[turn])
                for key in METADATA:  # a reader of the result would turn it again
                    opened.info.pop(key, None)
            return _to_rgb(opened)


def image_size(image: bytes | str | Path | Image.Image | tuple[int, int], name: str, frame: int = 0) -> tuple[int, int]:
    """Return (width, height) of the image that `open_image` returns, from its header alone.

    Args:
      image: as for `open_image`; or its (width, height), which is returned.

    Raises:
      UserError: as `open_image`, except errors that only decoding finds.
    """
    if isinstance(image, tuple):
        return image
    if isinstance(image, Image.Image):
        check_size(image, name)
        return image.size
    with image_errors(name), open_file(image) as file:
        header = open_header(file, name, frame)
        # Some versions of Pillow turn the size of a TIFF when they open it.
        is_tiff = isinstance(header, TiffImageFile)
        width, height = (header.tag_v2[WIDTH], header.tag_v2[HEIGHT]) if is_tiff else header.size
        turned = orientation(header, has_late_exif(file)) in QUARTER_TURNS
    return (height, width) if turned else (width, height)


def open_header(file: BinaryIO, name: str, frame: int = 0) -> Image.Image:
    """Open an image for decoding at a size that fits the memory limit, without decoding it.

    Raises:
      UserError: the image exceeds the limit, or has no pixels.
    """
    image = identify(file)
    if frame:
        image.seek(frame)
    width, height = image.size
    if isinstance(image, JpegImageFile):
        coefficients = _coefficient_bytes(image)
        sizes = ((scale, -(-width // scale) * -(-height // scale)) for scale in JPEG_SCALES)
        fitting = (scale for scale, pixels in sizes if pixels * PIXEL_BYTES + coefficients <= memory_limit())
        scale = next(fitting, JPEG_SCALES[-1])
        if scale > 1:
            image.draft(image.mode, (width // scale, height // scale))
        check_size(image, name, coefficients)
    else:
        check_size(image, name)
    return image


def _coefficient_bytes(image: JpegImageFile) -> int:
    """Return the bytes of a progressive JPEG's coefficients, which the decoder holds at full size: two for each sample."""
    if not image.info.get("progressive"):
        return 0
    samplings = [(across, down) for _, across, down, *_ in image.layer]  # pyright: ignore[reportAttributeAccessIssue]
    densest = max(across for across, _ in samplings) * max(down for _, down in samplings)
    return 2 * image.width * image.height * sum(across * down for across, down in samplings) // densest


@contextlib.contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Turn every error of reading an image into a UserError with its name."""
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{name}: the image cannot be read: {error}") from error
    except Exception as error:  # decoders of broken bytes raise errors of every kind
        raise UserError(f"{name}: the image cannot be read ({one_line(error)}); repair or remove it") from error


def check_size(image: Image.Image, name: str, more: int = 0) -> None:
    """Refuse an opened image without pixels, or that exceeds the memory limit, before it is decoded.

    Args:
      more: bytes that its decoder takes in addition.

    Raises:
      UserError: with the size of the image.
    """
    (width, height), limit = image.size, memory_limit()
    if not width * height:
        raise UserError(f"{name}: the image is {width}x{height} pixels; expected at least one")
    if (needed := decoded_bytes(image.size) + more) > limit:
        mib = -(-needed // 2**20)
        raise UserError(
            f"{name}: the image is {width}x{height} pixels, {mib:,} MiB in memory; expected at most {limit >> 20:,} MiB; make it "
            f"smaller, or set --image-mib={mib} (from Python, the environment variable {MEMORY_KEY})"
        )


def decoded_bytes(size: tuple[int, int]) -> int:
    """Return the bytes of a decoded image of (width, height)."""
    return size[0] * size[1] * PIXEL_BYTES


def memory_limit() -> int:
    """Return the most bytes of a decoded image.

    Raises:
      UserError: the environment variable holds something else than a number.
    """
    return parse_mib(os.environ.get(MEMORY_KEY, str(MEMORY_MIB))) << 20


def parse_mib(text: str) -> int:
    """Parse a memory limit in MiB.

    Raises:
      UserError: expected an integer from 1 to 2**20 - 1.
    """
    if not (text.isascii() and text.isdigit() and len(text) < 8 and 0 < int(text) < 2**20):
        raise UserError(f"{text!r}: expected the MiB of a decoded image, 1 to {2**20 - 1}")
    return int(text)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and image.info.get("transparency") is None:
        image.load()  # as `convert` does, but without its copy
        return image
    if image.width * image.height <= STRIP_PIXELS:
        return _strip_to_rgb(image)
    rgb, rows = Image.new("RGB", image.size), max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):  # a conversion holds several copies
        strip = (0, top, image.width, min(top + rows, image.height))
        rgb.paste(_strip_to_rgb(image.crop(strip)), strip)
    return rgb


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # "I;16" of PNG and TIFF, and "I"
        return _to_8_bits(image)
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Return an image of 16 bits of grey in RGB, scaled; numbers beyond 16 bits are clipped."""
    grey = np.asarray(image).astype(np.int64).clip(0, 65535)
    scaled = ((grey + 128) // 257).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        scaled[grey == transparent] = 255
    return Image.fromarray(scaled).convert("RGB")
