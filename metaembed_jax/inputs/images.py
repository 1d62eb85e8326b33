"""Images of any format, upright and in RGB, with exactly the pixels that transformers reads."""

import contextlib
import functools
import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from metaembed_jax.errors import UserError

MAX_SOURCE_PIXELS = 64_000_000  # of an image, checked before it is decoded
MAX_ASPECT_RATIO = 200  # some families refuse images beyond it, so preparation does
ORIENTATION, QUARTER_TURNS = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap width and height
WIDTH, HEIGHT = 0x0100, 0x0101  # tags of a TIFF
TEXT_CHUNKS, TURNING = (b"tEXt", b"zTXt", b"iTXt"), (b"Raw profile type exif", b"XML:com.adobe.xmp", b"xmp")  # of a PNG


def open_image(image: bytes | str | Path | Image.Image, name: str) -> Image.Image:
    """Decode an image to RGB as transformers does; an open RGB image is returned itself.

    Encoded bytes and files are turned upright by their EXIF orientation (as `transformers.image_utils.load_image`); open images are
    not. Transparency is composited onto white, and Pillow's `convert("RGB")` converts every other mode (as
    `transformers.image_transforms.convert_to_rgb`): 16 bits are clipped to 8, not scaled. An animation gives its first frame.

    Raises:
      UserError: the image is unreadable, truncated or empty, or has more than `MAX_SOURCE_PIXELS` (checked before decoding).
    """
    encoded = not isinstance(image, Image.Image)
    with image_errors(name):
        if encoded:
            image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else Path(image))
        check_size(image, name)
        if encoded:
            ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)


@contextlib.contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Turn every error of reading an image into a UserError with its name."""
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError as error:  # its own message is an address in memory
        raise UserError(f"{name}: the image cannot be read (it is of no known format); repair or remove it") from error
    except Exception as error:  # decoders of broken bytes raise errors of every kind
        raise UserError(f"{name}: the image cannot be read ({' '.join(str(error).split())}); repair or remove it") from error


def check_size(image: Image.Image, name: str) -> None:
    """Refuse an opened image without pixels, or with more than `MAX_SOURCE_PIXELS`, before it is decoded.

    Raises:
      UserError: with the size of the image.
    """
    width, height = image.size
    if not 0 < width * height <= MAX_SOURCE_PIXELS:
        raise UserError(f"{name}: the image is {width}x{height} pixels; expected 1 to {MAX_SOURCE_PIXELS} pixels")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and image.info.get("transparency") is None:
        image.load()  # as `convert` does, but without its copy
        return image
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def image_size(image: bytes | str | Path | Image.Image | tuple[int, int], name: str) -> tuple[int, int]:
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
        header = Image.open(file)
        check_size(header, name)
        # Some versions of Pillow turn the size of a TIFF when they open it.
        is_tiff = isinstance(header, TiffImageFile)
        width, height = (header.tag_v2[WIDTH], header.tag_v2[HEIGHT]) if is_tiff else header.size
        exif = header.getexif
        if header.format == "PNG" and not _has_late_exif(image):
            exif = functools.partial(Image.Image.getexif, header)  # the method of PNG images decodes the image first
        turned = exif().get(ORIENTATION, 1) in QUARTER_TURNS
    return (height, width) if turned else (width, height)


def _open_file(image: bytes | str | Path) -> BinaryIO:
    return io.BytesIO(image) if isinstance(image, bytes) else Path(image).open("rb")


def _has_late_exif(image: bytes | str | Path) -> bool:
    """Return whether a PNG has EXIF data after its pixels, which opening does not read."""
    after_pixels = False
    with _open_file(image) as file:
        file.seek(8)  # the signature
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            start = file.tell()
            if after_pixels and (kind == b"eXIf" or (kind in TEXT_CHUNKS and file.read(32).startswith(TURNING))):
                return True
            after_pixels = after_pixels or kind == b"IDAT"
            file.seek(start + length + 4)  # a checksum ends each chunk
    return False
