"""Images of any format, upright and in RGB, read alike by preparation, training, indexing, evaluation and search."""

import contextlib
import io
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile, jpeg_factory
from PIL.TiffImagePlugin import TiffImageFile

from metaembed_jax.errors import UserError

MEMORY_KEY = "METAEMBED_IMAGE_MIB"  # environment variable: the most memory of a decoded image, in MiB
MEMORY_MIB = 512  # its default: 134 megapixels
PIXEL_BYTES = 4  # of a decoded pixel, which Pillow pads
MAX_ASPECT_RATIO = 200  # some families refuse images beyond it, so preparation does
ORIENTATION = 0x0112  # the EXIF tag
QUARTER_TURNS = (5, 6, 7, 8)  # its values that swap width and height
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
WIDTH, HEIGHT = 0x0100, 0x0101  # tags of a TIFF
SUBFILE, IS_NO_PAGE = 0x00FE, 0b101  # the tag of a TIFF's frame, and its bits for a reduced copy and for a mask
JPEG = b"\xff\xd8\xff"  # its first bytes
JPEG_SCALES = (1, 2, 4, 8)  # by which its decoder can divide a size
PNG = b"\x89PNG\r\n\x1a\n"  # its first bytes
TEXT_CHUNKS, TURNING = (b"tEXt", b"zTXt", b"iTXt"), (b"Raw profile type exif", b"XML:com.adobe.xmp", b"xmp")  # of a PNG
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
        with _open_file(image) as file:
            opened = open_header(file, name, frame)
            turn = orientation(opened, _has_late_exif(file))
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
    with image_errors(name), _open_file(image) as file:
        header = open_header(file, name, frame)
        # Some versions of Pillow turn the size of a TIFF when they open it.
        is_tiff = isinstance(header, TiffImageFile)
        width, height = (header.tag_v2[WIDTH], header.tag_v2[HEIGHT]) if is_tiff else header.size
        turned = orientation(header, _has_late_exif(file)) in QUARTER_TURNS
    return (height, width) if turned else (width, height)


def open_header(file: BinaryIO, name: str, frame: int = 0) -> Image.Image:
    """Open an image for decoding at a size that fits the memory limit, without decoding it.

    Raises:
      UserError: the image exceeds the limit, or has no pixels.
    """
    image = _identify(file)
    if frame:
        image.seek(frame)
    width, height = image.size
    if isinstance(image, JpegImageFile):
        whole = _coefficient_bytes(image)
        sizes = ((scale, -(-width // scale) * -(-height // scale)) for scale in JPEG_SCALES)
        fitting = (scale for scale, pixels in sizes if pixels * PIXEL_BYTES + whole <= memory_limit())
        scale = next(fitting, JPEG_SCALES[-1])
        if scale > 1:
            image.draft(image.mode, (width // scale, height // scale))
        check_size(image, name, whole)
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


def _identify(file: BinaryIO) -> Image.Image:
    """Open an image. Pillow's own limit of pixels does not hold for JPEGs, nor where the user sets one."""
    if MEMORY_KEY in os.environ:
        Image.MAX_IMAGE_PIXELS = None
    is_jpeg = file.read(len(JPEG)) == JPEG
    file.seek(0)
    return jpeg_factory(file) if is_jpeg else Image.open(file)  # pyright: ignore[reportArgumentType]


def tiff_pages(file: Path) -> tuple[int, ...]:
    """Return the frames of a TIFF that are pages, not reduced copies or masks; frame 0 alone if the file cannot be read."""
    pages = []
    try:
        with Image.open(file) as opened:
            for frame in range(getattr(opened, "n_frames", 1)):
                opened.seek(frame)
                tags = opened.tag_v2 if isinstance(opened, TiffImageFile) else {}
                pages += [] if frame and int(tags.get(SUBFILE, 0)) & IS_NO_PAGE else [frame]
    except Exception:  # parsers of broken files raise errors of every kind; reading the image names it
        return tuple(pages) or (0,)
    return tuple(pages)


def orientation(image: Image.Image, is_late: bool) -> int:
    """Return the orientation that the metadata of an opened image say, 1 to 8; 1 if they cannot be parsed.

    Args:
      is_late: a PNG has it after its pixels, so that it must be decoded first.
    """
    try:
        # The method of PNG images decodes the image first.
        exif = image.getexif() if image.format != "PNG" or is_late else Image.Image.getexif(image)
        turn = exif.get(ORIENTATION, 1)
    except Exception:  # parsers of broken metadata raise errors of every kind
        return 1
    return turn if isinstance(turn, int) and turn in TURNS else 1


@contextlib.contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Turn every error of reading an image into a UserError with its name."""
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError as error:  # its own message is an address in memory
        raise UserError(f"{name}: the image cannot be read (it is of no known format); repair or remove it") from error
    except Image.DecompressionBombError as error:  # Pillow's own limit; its message begins with the number of pixels
        pixels = int(re.findall("[0-9]+", str(error))[0])
        raise _too_large(name, f"has {pixels:,}", pixels * PIXEL_BYTES) from error
    except Exception as error:  # decoders of broken bytes raise errors of every kind
        raise UserError(f"{name}: the image cannot be read ({' '.join(str(error).split())}); repair or remove it") from error


def check_size(image: Image.Image, name: str, more: int = 0) -> None:
    """Refuse an opened image without pixels, or that exceeds the memory limit, before it is decoded.

    Args:
      more: bytes that its decoder takes in addition.

    Raises:
      UserError: with the size of the image.
    """
    (width, height), limit = image.size, memory_limit()
    needed = width * height * PIXEL_BYTES + more
    if not width * height:
        raise UserError(f"{name}: the image is {width}x{height} pixels; expected at least one")
    if needed > limit:
        raise _too_large(name, f"is {width}x{height}", needed)


def _too_large(name: str, size: str, needed: int) -> UserError:
    mib = -(-needed // 2**20)
    return UserError(
        f"{name}: the image {size} pixels, {mib:,} MiB in memory; expected at most {memory_limit() >> 20:,} MiB; make it smaller, "
        f"or set {MEMORY_KEY}={mib}"
    )


def memory_limit() -> int:
    """Return the most bytes of a decoded image."""
    value = os.environ.get(MEMORY_KEY, str(MEMORY_MIB))
    if not (value.isascii() and value.isdigit() and 0 < int(value) < 2**20):
        raise UserError(f"{MEMORY_KEY}={value}: expected a positive number of MiB")
    return int(value) << 20


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # "I;16" of PNG and TIFF, and "I"
        return _to_8_bits(image)
    if image.mode == "RGB" and image.info.get("transparency") is None:
        image.load()  # as `convert` does, but without its copy
        return image
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


def _open_file(image: bytes | str | Path) -> BinaryIO:
    return io.BytesIO(image) if isinstance(image, bytes) else Path(image).open("rb")


def _has_late_exif(file: BinaryIO) -> bool:
    """Return whether a file is a PNG with EXIF data after its pixels, which opening does not read. Keeps the file's position."""
    position, after_pixels = file.tell(), False
    file.seek(0)
    try:
        if file.read(8) != PNG:
            return False
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            start = file.tell()
            if after_pixels and (kind == b"eXIf" or (kind in TEXT_CHUNKS and file.read(32).startswith(TURNING))):
                return True
            after_pixels = after_pixels or kind == b"IDAT"
            file.seek(start + length + 4)  # a checksum ends each chunk
        return False
    finally:
        file.seek(position)
