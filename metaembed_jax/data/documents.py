"""Documents to search: a folder of images and PDF files, or a table of texts and images. They are read one by one when needed.

    FOLDER/**              images, a document each, and PDF files and TIFFs of several pages, a document for each page
    items.jsonl, .parquet  rows with id, text, image: any of them may be absent, but not text and image together;
                           other columns are kept as metadata, and a line names them

Documents of a folder are in natural order: page2 before page10, and a folder where its name is in the order of the files. Hidden
files and folders are skipped. Other files, and links to folders or out of the folder, are not read; a line counts them.

A document that cannot be read is an error, or left out (`skip`): an encrypted, broken or empty PDF file at once, a broken image
when it is read.
"""

import copy
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Self

import numpy as np
from jaxtyping import UInt64
from tqdm import tqdm

from metaembed_jax.data.document_sequence import Documents
from metaembed_jax.data.folder_files import DOCUMENT_ENDINGS, find_files
from metaembed_jax.data.left_out import LeftOut, check_left_out
from metaembed_jax.data.pdf import PdfReader
from metaembed_jax.data.sources.image_files import read_image_file
from metaembed_jax.data.sources.row_files import open_row_files
from metaembed_jax.data.stamps import file_stamp, stamp_of
from metaembed_jax.data.table_documents import TableDocuments
from metaembed_jax.errors import UserError, printable
from metaembed_jax.files import local_path
from metaembed_jax.inputs.image_formats import tiff_pages
from metaembed_jax.inputs.images import image_size, open_image

MOST_KINDS = 10  # of files that are not read, in the line that counts them
TABLES = frozenset((".jsonl", ".parquet"))


def open_documents(path: str | Path, *, skip: int = 0) -> Documents:
    """Open the documents of a folder, of an image or PDF file, or of a table.

    Pages of PDF files are drawn at the size that the model reads where one encodes them, and at 1024 * 28 * 28 pixels elsewhere.

    Args:
      skip: most files of a folder that may be left out because they cannot be opened, or rows of a table that cannot be read.

    Raises:
      UserError: there are no documents, a PDF file or table cannot be read, or an id occurs twice; names the file, and its row.
    """
    path = local_path(path)
    if path.is_dir():
        files, not_read = find_files(path)
        if not_read:
            print(f"{path}: not read: {_summary(not_read)}", flush=True)
        if not files:
            raise UserError(f"{path} has no images or PDF files in it")
        return FolderDocuments(path, files, skip)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix.lower() in TABLES:
        return TableDocuments(open_row_files([path]), skip)
    if path.suffix.lower() not in DOCUMENT_ENDINGS:
        raise UserError(f"{path}: expected an image, PDF file or table ({', '.join(sorted(DOCUMENT_ENDINGS | TABLES))})")
    return FolderDocuments(path.parent, [path], skip)


def _summary(not_read: Counter) -> str:
    """Return the most frequent kinds of files that are not read, with their numbers."""
    kinds = [f"{printable(kind)} ({count:,})" for kind, count in sorted(not_read.most_common(MOST_KINDS))]
    rest = not_read.total() - sum(count for _, count in not_read.most_common(MOST_KINDS))
    return ", ".join(kinds + [f"files with other endings ({rest:,})"] * bool(rest))


class FolderDocuments(Documents):
    """Images and pages of PDF and TIFF files. An image's id is its path in the folder; a page's ends with #page=N, as links do."""

    def __init__(self, root: Path, files: Sequence[Path], skip: int = 0):
        self.root, self.reader = root, PdfReader()
        self.frames = {}  # of each TIFF that has several pages
        counts, self.left_out = {}, []
        for file in tqdm(files, desc="opening", unit="file", delay=2, leave=False, disable=None):
            try:
                counts[file] = self._count(file)
            except UserError as error:
                self.left_out.append(LeftOut(self._id(file, None), str(error)))
        check_left_out(self.left_out, skip)
        self.files, self.starts = tuple(counts), list(accumulate(counts.values(), initial=0))

    def ids(self) -> list[str]:
        return [self._id(file, page) for file, pages in self._pages() for page in pages]

    def stamps(self) -> UInt64[np.ndarray, " N"]:
        stamps, real = [], lru_cache(os.path.realpath)
        for file, pages in tqdm(self._pages(), "reading times", len(self.files), unit="file", delay=2, leave=False, disable=None):
            status = file_stamp(file, real)
            stamps += [stamp_of((self._id(file, page), status, page)) for page in pages]
        return np.array(stamps, np.uint64)

    def _id(self, file: Path, page: int | None) -> str:
        name = file.relative_to(self.root).as_posix()
        return f"{name}#page={page}" if page else name

    def _pages(self) -> Iterator[tuple[Path, Sequence[int | None]]]:
        """Yield each file and the pages of its documents, None for an image."""
        for file, start, end in zip(self.files, self.starts, self.starts[1:], strict=False):
            yield file, range(1, end - start + 1) if self._has_pages(file) else (None,)

    def _has_pages(self, file: Path) -> bool:
        return _is_pdf(file) or file in self.frames

    def _count(self, file: Path) -> int:
        """Return the number of documents in a file."""
        if _is_pdf(file):
            return self.reader.count(file)
        if file.suffix.lower() in (".tif", ".tiff") and len(frames := tiff_pages(file)) > 1:
            self.frames[file] = frames
            return len(frames)
        return 1

    def drawn_at(self, pixels: int) -> Self:
        other = copy.copy(self)
        other.reader = PdfReader(pixels)
        return other

    def __len__(self) -> int:
        return self.starts[-1]

    def id_of(self, number: int) -> str:
        return self._id(*self._find(number))

    def metadata(self, number: int) -> dict:
        file, page = self._find(number)
        return {"id": self._id(file, page), "path": os.path.abspath(file), "page": page, "text": None}

    def item_name(self, number: int) -> str:
        file, page = self._find(number)
        return f"{file}, page {page}" if page else str(file)

    def describe(self, number: int) -> dict:
        """Return the item with (width, height) in place of its image, which is not decoded."""
        file, page = self._find(number)
        if _is_pdf(file):
            return {"image": self.reader.size(file, page or 1)}
        return {"image": image_size(file, self.item_name(number), self._frame(file, page))}

    def _item(self, number: int) -> dict:
        file, page = self._find(number)
        if _is_pdf(file):
            return {"image": self.reader.page(file, page or 1)}
        return {"image": open_image(read_image_file(file), self.item_name(number), self._frame(file, page))}

    def _frame(self, file: Path, page: int | None) -> int:
        return self.frames[file][page - 1] if page else 0

    def _find(self, number: int) -> tuple[Path, int | None]:
        """Return the file of a document, and its page if that is a PDF file or a TIFF of several pages."""
        number = range(len(self))[number]
        index = bisect_right(self.starts, number) - 1
        file = self.files[index]
        return file, number - self.starts[index] + 1 if self._has_pages(file) else None


def _is_pdf(file: Path) -> bool:
    return file.suffix.lower() == ".pdf"
