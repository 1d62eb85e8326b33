"""A folder as people have it: images of every format that is read, PDFs, TIFFs of several pages, and broken files of each kind."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((56, 56), (84, 63), (41, 97), (120, 30), (28, 29))
FORMATS = (
    ("png", "RGB"),
    ("png", "L"),
    ("png", "LA"),
    ("png", "RGBA"),
    ("png", "P"),
    ("png", "1"),
    ("png", "I;16"),
    ("jpg", "RGB"),
    ("jpeg", "L"),
    ("jpg", "CMYK"),
    ("webp", "RGB"),
    ("webp", "RGBA"),
    ("gif", "P"),
    ("bmp", "RGB"),
    ("tif", "RGB"),
    ("tiff", "CMYK"),
    ("tif", "I;16"),
    ("avif", "RGB"),
)
PAGED = ("pdf", "tif")
BROKEN_SHARE = 37  # one file in so many is broken; a prime, so that each kind is


def write_mixed_files(root: Path, count: int, seed: int = 0) -> set[str]:
    """Write files, one in `BROKEN_SHARE` of them broken, and return the paths of the broken ones in the folder.

    A file of pages that is cut may still have whole pages.
    """
    rng, broken = np.random.default_rng(seed), set()
    for number in range(count):
        folder = root / f"{number // 500}"
        folder.mkdir(parents=True, exist_ok=True)
        ending, content = make_file(rng, number)
        if number % BROKEN_SHARE == BROKEN_SHARE - 1:
            content = broken_content(rng, content)
            broken.add(f"{folder.name}/{number:05}.{ending}")
        (folder / f"{number:05}.{ending}").write_bytes(content)
    return broken


def make_file(rng: np.random.Generator, number: int) -> tuple[str, bytes]:
    """Return the ending and the content of a file; kinds take turns, and one in ten has pages."""
    if number % 10 == 9:
        ending, file = PAGED[number // 10 % 2], io.BytesIO()
        first, *others = (noise(rng, "RGB") for _ in range(1 + number // 20 % 3))
        first.save(file, {"pdf": "PDF", "tif": "TIFF"}[ending], save_all=True, append_images=others)
        return ending, file.getvalue()
    ending, mode = FORMATS[number % len(FORMATS)]
    return ending, encode(noise(rng, mode), ending)


def noise(rng: np.random.Generator, mode: str) -> Image.Image:
    """Return an image of noise, of one of a few sizes."""
    width, height = SIZES[rng.integers(len(SIZES))]
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), np.uint16))
    if mode in ("LA", "RGBA"):
        return Image.fromarray(rng.integers(0, 256, (height, width, len(mode)), np.uint8), mode)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


def encode(image: Image.Image, ending: str) -> bytes:
    """Return an image in the format of a file's ending."""
    file = io.BytesIO()
    image.save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(ending, ending.upper()))
    return file.getvalue()


def broken_content(rng: np.random.Generator, content: bytes) -> bytes:
    """Return a content that no reader accepts: cut in its header or its middle, empty, or of another kind."""
    return (content[: len(content) // 2], content[: int(rng.integers(1, 16))], b"", b"<html>404 Not Found</html>")[rng.integers(4)]


def change_files(root: Path, count: int) -> None:
    """Replace the content of `count` images under their names, remove as many others, and add as many."""
    rng, files = np.random.default_rng(1), list(whole_images(root))
    chosen = rng.choice(len(files), 2 * count, replace=False)
    for number in chosen[:count]:
        file = files[number]
        file.write_bytes(encode(noise(rng, "RGB"), file.suffix[1:]))
        os.utime(file, ns=(1, file.stat().st_mtime_ns + 10**9))
    for number in chosen[count:]:
        files[number].unlink()
    for number in range(count):
        (root / f"new {number}.png").write_bytes(encode(noise(rng, "RGB"), "png"))


def whole_images(root: Path) -> Iterator[Path]:
    """Yield the files of one document each that are not broken, in the order of their numbers."""
    for file in sorted(root.glob("*/*.*"), key=lambda file: file.stem):
        number = int(file.stem)
        if number % 10 != 9 and number % BROKEN_SHARE != BROKEN_SHARE - 1 and file.suffix[1:] in ("png", "jpg", "webp", "bmp"):
            yield file
