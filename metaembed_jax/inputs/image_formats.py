"""Formats of images by their first bytes, and what their headers say: pages, orientation.

Pillow knows more formats. They are left out because no signature tells them from other files (TGA, PCX, DIB), because they hold
several sizes of one icon (ICO, ICNS), or because another program decodes them (EPS, WMF).
"""

import contextlib
import io
import struct
import warnings
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "JPEG2000", "PPM")  # names of Pillow; MPO is a JPEG, APNG a PNG
ENDINGS = frozenset(
    ".apng .avif .bmp .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()
)  # of files of these formats
PREFIX = 16  # bytes from which Pillow knows a format
HEIC = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")  # brands of the pictures of phones, which Pillow cannot decode
PNG = b"\x89PNG\r\n\x1a\n"  # its first bytes
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"MM*\0", b"II\0*")  # the first bytes of its variants
TEXT_CHUNKS, TURNING = (b"tEXt", b"zTXt", b"iTXt"), (b"Raw profile type exif", b"XML:com.adobe.xmp", b"xmp")  # of a PNG
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
SUBFILE, NOT_A_PAGE = 0x00FE, 0b101  # the tag of a TIFF's frame, and its bits for a reduced copy and for a mask

# Pillow warns of metadata that it cannot parse and of sizes that are checked here. Filters for a single call are not safe in
# threads. This one is the last, so every filter of the program has precedence.
warnings.filterwarnings("ignore", module=r"PIL\.", append=True)


def identify(file: BinaryIO) -> Image.Image:
    """Open an image of one of `FORMATS` without decoding it. Unlike `Image.open`, this has no limit on its pixels.

    Raises:
      UnidentifiedImageError: the format is another; says which are read.
      Exception: as the format's parser.
    """
    Image.init()
    prefix = file.read(PREFIX)
    for format in FORMATS:
        factory, accepts = Image.OPEN.get(format, (None, None))  # Pillow may be built without a format
        if factory is not None and accepts is not None and accepts(prefix) is True:
            file.seek(0)
            with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):  # as `Image.open`
                return factory(file, "")  # pyright: ignore[reportArgumentType]
    if prefix[4:8] == b"ftyp" and prefix[8:12] in HEIC:
        raise UnidentifiedImageError("it is HEIC, which is not read; convert it to JPEG")
    raise UnidentifiedImageError(f"its format is none of {', '.join(FORMATS)}; convert or remove it")


def open_file(image: bytes | str | Path) -> BinaryIO:
    """Open encoded bytes or a file."""
    return io.BytesIO(image) if isinstance(image, bytes) else Path(image).open("rb")


def tiff_pages(image: bytes | Path) -> tuple[int, ...]:
    """Return the frames of a TIFF that are pages, not reduced copies or masks.

    Frame 0 alone is returned if the file is not a TIFF, or is broken.
    """
    pages = []
    try:
        with open_file(image) as file:
            if file.read(len(TIFF[0])) not in TIFF:
                return (0,)
            file.seek(0)
            opened = TiffImageFile(file)
            for frame in range(opened.n_frames):
                opened.seek(frame)
                pages += [] if frame and int(opened.tag_v2.get(SUBFILE, 0)) & NOT_A_PAGE else [frame]
    except Exception:  # parsers of broken files raise errors of every kind; reading the image names it
        return tuple(pages) or (0,)
    return tuple(pages)


def orientation(image: Image.Image, is_late: bool) -> int:
    """Return the orientation that the metadata of an opened image say, 1 to 8; 1 if they cannot be parsed.

    Args:
      is_late: a PNG has it after its pixels, so that it must be decoded first.

    Raises:
      Exception: as the decoder, if `is_late`.
    """
    if is_late:
        image.load()  # outside of the next lines: after an error, Pillow gives broken pixels without one
    try:
        # The method of PNG images decodes the image first.
        exif = image.getexif() if image.format != "PNG" else Image.Image.getexif(image)
        turn = exif.get(ORIENTATION, 1)
    except Exception:  # parsers of broken metadata raise errors of every kind
        return 1
    return turn if isinstance(turn, int) and turn in TURNS else 1


def has_late_exif(file: BinaryIO) -> bool:
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
