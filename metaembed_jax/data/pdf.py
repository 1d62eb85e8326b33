"""Pages of PDF files as images, drawn by PDFium."""

import contextlib
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from metaembed_jax.errors import UserError, one_line
from metaembed_jax.inputs.images import MAX_ASPECT_RATIO, PIXEL_BYTES, memory_limit

PAGE_PIXELS = 1024 * 28 * 28  # of a page that is drawn for no model: 1,024 visual tokens of Qwen2.5-VL
_pdfium = threading.Lock()  # PDFium allows one thread of a process at a time


class PdfReader:
    """Reads pages, and keeps one file open. Can be pickled and forked: every process opens files for itself.

    Args:
      pixels: of a drawn page, about; fewer if they exceed the memory limit of images.
    """

    def __init__(self, pixels: int = PAGE_PIXELS):
        self.pixels = pixels
        self._opened = None  # ((process, file), document)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": None}

    def count(self, file: Path) -> int:
        """Return the number of pages.

        Raises:
          UserError: the file cannot be read, is encrypted, or has no page.
        """
        with _pdfium:
            return len(self._open(file))

    def page(self, file: Path, number: int) -> Image.Image:
        """Draw a page, numbered from 1, in RGB on white.

        Raises:
          UserError: the page cannot be read, or one of its sides is far longer than the other.
        """
        name = f"{file}, page {number}"
        with _pdfium:
            document = self._open(file)
            with _page_errors(name, "drawn"):
                page = document[number - 1]
                bitmap = page.render(scale=self._scale(*page.get_size(), name))  # pyright: ignore[reportArgumentType] (documented as float)
                image = bitmap.to_pil()  # a copy, because the order of channels changes
                bitmap.close()
                page.close()
                return image

    def size(self, file: Path, number: int) -> tuple[int, int]:
        """Return (width, height) of the image that `page` draws, without drawing it.

        Raises:
          UserError: as `page`.
        """
        name = f"{file}, page {number}"
        with _pdfium, _page_errors(name, "read"):
            width, height = self._open(file).get_page_size(number - 1)
        scale = self._scale(width, height, name)
        return math.ceil(width * scale), math.ceil(height * scale)

    def _open(self, file: Path):
        key = os.getpid(), file  # a forked process shares the position in its parent's file
        if self._opened is None or self._opened[0] != key:
            if self._opened is not None:
                self._opened[1].close()
                self._opened = None
            self._opened = key, _open_document(file)
        return self._opened[1]

    def _scale(self, width: float, height: float, name: str) -> float:
        """Return the pixels of a point."""
        if not (0 < width < math.inf and 0 < height < math.inf):
            raise UserError(f"{name} is {width:g} x {height:g} points; expected positive numbers; repair or remove it")
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise UserError(f"{name} is {width:g} x {height:g} points; one side is over {MAX_ASPECT_RATIO} times the other")
        return math.sqrt(min(self.pixels, memory_limit() // PIXEL_BYTES) / (width * height))


@contextlib.contextmanager
def _page_errors(name: str, verb: str) -> Iterator[None]:
    """Turn the errors of the library, which are of several kinds, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name} cannot be {verb} ({one_line(error)}); repair or remove it") from error


def _open_document(file: Path):
    import pypdfium2
    from pypdfium2 import raw

    handle = raw.FPDF_LoadDocument(os.fsencode(file) + b"\0", None)
    if not handle:
        error = raw.FPDF_GetLastError()
        reasons = {raw.FPDF_ERR_PASSWORD: "is encrypted", raw.FPDF_ERR_FILE: "cannot be opened"}
        raise UserError(f"{file} {reasons.get(error, 'is not a readable PDF file')}; repair, decrypt or remove it")
    document = pypdfium2.PdfDocument(handle)
    try:
        document.init_forms()  # the text in the fields of a form is drawn with its page
    except pypdfium2.PdfiumError as error:
        raise UserError(f"{file} has a form that cannot be read; print it to a new PDF file") from error
    if not len(document):
        raise UserError(f"{file} has no pages; repair or remove it")
    return document
