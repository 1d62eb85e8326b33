"""Documents to search: a folder of images and PDF files, or a table of texts and images. They are read one by one when needed.

    FOLDER/**              images, a document each, and PDF files and TIFFs of several pages, a document for each page
    items.jsonl, .parquet  rows with id, text, image: any of them may be absent, but not text and image together;
                           other columns are kept as metadata, and a line names them

Documents of a folder are in natural order: page2 before page10, and a folder where its name is in the order of the files. Hidden
files and folders are skipped. Other files, and links to folders or out of the folder, are left out; a line says how many.

A document that cannot be read is an error, or left out (`skip`): an encrypted, broken or empty PDF file at once, a broken image
when it is read.
"""

import copy
import dataclasses
import json
import os
import re
import threading
from abc import abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path, PurePath
from typing import Self

import numpy as np
from jaxtyping import UInt64
from tqdm import tqdm

from metaembed_jax.data.left_out import LeftOut, check_left_out
from metaembed_jax.data.pdf import PdfReader
from metaembed_jax.data.sources.image_files import ImageFolder, image_path, read_image_file, unread_pages
from metaembed_jax.data.sources.row_files import PANDAS_INDEX, RowFiles, open_row_files, print_further_columns, read_each, unique_id
from metaembed_jax.data.stamps import file_stamp, stamp_of
from metaembed_jax.errors import UserError
from metaembed_jax.files import local_path
from metaembed_jax.inputs.image_formats import ENDINGS, tiff_pages
from metaembed_jax.inputs.images import image_size, open_image

TABLES = frozenset((".jsonl", ".parquet"))
COLUMNS = {"id", "text", "image"}


class Documents(Sequence):
    """Documents in a fixed order. `documents[i]` is an item for `MetaEmbed.encode_document`. Can be pickled.

    Attributes:
      files: those that are read, without the images that a table names.
      left_out: files that cannot be opened, whose documents are left out.
    """

    files: tuple[Path, ...]
    left_out: Sequence[LeftOut] = ()

    def __getitem__(self, number):
        """Return {"text": str, "image": PIL image or encoded bytes}, either or both; for a slice, a list of them.

        Raises:
          UserError: a document cannot be read; names its file, and its page or row.
        """
        numbers = range(len(self))[number]
        return [self._item(number) for number in numbers] if isinstance(numbers, range) else self._item(numbers)

    def drawn_at(self, pixels: int) -> Self:
        """Return these documents with pages of PDF files drawn at about so many pixels, as `PromptProcessor.page_pixels` gives."""
        return self

    @property
    def unread_pages(self) -> int:
        """The number of pages that are no documents: all but the first of a TIFF that a table names, of the rows read so far."""
        return 0

    @abstractmethod
    def ids(self) -> list[str]:
        """Return the ids of all documents."""

    @abstractmethod
    def stamps(self) -> UInt64[np.ndarray, " N"]:
        """Return a number for each document that changes when its file, or its row or the image that it names, changes.

        Files are told apart by path, size and time; no image or PDF file is opened.
        """

    @abstractmethod
    def id_of(self, number: int) -> str:
        """Return the id of a document."""

    @abstractmethod
    def metadata(self, number: int) -> dict:
        """Return the document's id, path (of the file that shows it), page (from 1) and text, None where absent.

        Of a table, also return its further columns.
        """

    @abstractmethod
    def item_name(self, number: int) -> str:
        """Return the name of a document for errors: its file, and the page or row."""

    @abstractmethod
    def _item(self, number: int) -> dict: ...


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
        files, left_out = find_files(path)
        if left_out:
            print(f"{path}: not read: {', '.join(f'{kind} ({count:,})' for kind, count in sorted(left_out.items()))}", flush=True)
        if not files:
            raise UserError(f"{path} has no images or PDF files in it")
        return FolderDocuments(path, files, skip)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix.lower() in TABLES:
        return TableDocuments(open_row_files([path]), skip)
    if path.suffix.lower() not in ENDINGS | {".pdf"}:
        raise UserError(f"{path}: expected an image, PDF file or table ({', '.join(sorted(ENDINGS | TABLES | {'.pdf'}))})")
    return FolderDocuments(path.parent, [path], skip)


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
        return {"id": self._id(file, page), "path": str(file), "page": page, "text": None}

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


class TableDocuments(Documents):
    """Rows of a table. A row's id is in its column `id`; in a table without that column, it is the row's number from 0.

    A row that cannot be read, up to `skip` of them, is a document that cannot be read, with the id "row N".
    """

    def __init__(self, rows: RowFiles, skip: int = 0):
        columns = rows.columns()
        if not columns & {"text", "image"}:
            raise UserError(f"{rows.files[0]} has the columns {', '.join(sorted(columns))}; expected text or image, or both")
        print_further_columns(rows, COLUMNS, "kept as metadata, not encoded")
        self.rows, self.files, self.folder, self._ids = rows, rows.files, ImageFolder(rows.files[0].parent), None
        # Rows are read for vectors ahead of those whose metadata are read. From one open file each turn reads a row group again.
        self._described, self._lock = dataclasses.replace(rows), threading.Lock()
        self._unread: dict[int, int] = {}  # pages of the rows that have some
        if "id" in columns:
            self._ids = self._read_ids(skip)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def _read_ids(self, skip: int) -> list[str]:
        ids, seen, left_out = [], {}, []
        for number, row in enumerate(self._read_all(("id",))):
            if isinstance(row, UserError):
                left_out.append(LeftOut(f"row {number}", str(row)))
                check_left_out(left_out[:1], skip)  # without skip, at once
            value = f"row {number}" if isinstance(row, UserError) else row.get("id")
            ids.append(unique_id(value, "id", seen, self.rows, number))
        check_left_out(left_out, skip)
        return ids

    def _read_all(self, columns: tuple[str, ...] | None = None) -> Iterator[dict | UserError]:
        """Yield all rows; in place of one that cannot be read, its error."""
        return (row for _, row in read_each(partial(_read, self.rows, columns=columns), 0, len(self)))

    def ids(self) -> list[str]:
        return self._ids or list(map(str, range(len(self))))

    def stamps(self) -> UInt64[np.ndarray, " N"]:
        real = lru_cache(os.path.realpath)
        with self._lock:
            rows = tqdm(self._read_all(), "reading rows", len(self), unit="row", delay=2, leave=False, disable=None)
            return np.array([stamp_of((row, self._image_stamp(row, real))) for row in rows], np.uint64)

    def _image_stamp(self, row: dict | UserError, real: Callable) -> tuple | None:
        """Return the path, size and time of the image file that a row names; None without one."""
        path = None if isinstance(row, UserError) else image_path(row.get("image"))
        try:
            return file_stamp(Path(self.folder.find(path)[1]), real) if path else None
        except UserError:  # reading the document names what is wrong
            return None

    def __len__(self) -> int:
        return len(self.rows)

    def id_of(self, number: int) -> str:
        number = range(len(self))[number]
        return self._ids[number] if self._ids else str(number)

    def metadata(self, number: int) -> dict:
        number = range(len(self))[number]
        row = self._row(self._described, number)
        image, text = image_path(row.get("image")), row.get("text")
        path = str(self.folder.root / image) if image else None
        further = {name: value for name, value in row.items() if _is_metadata(name, value)}
        document = {"id": self.id_of(number), "path": path, "page": None, "text": text or None}
        return document | further | {name: value for name, value in document.items() if value is not None}

    @property
    def unread_pages(self) -> int:
        return sum(self._unread.values())

    def item_name(self, number: int) -> str:
        return self.rows.row_name(number)

    def _item(self, number: int) -> dict:
        row = self._row(self.rows, number)
        try:
            if "id" in row and not self._ids:
                raise UserError("has an id, which the first row lacks; expected an id in all rows or in none")
            item = self.folder.item("document", row.get("text"), row.get("image"), "image")
        except UserError as error:
            raise UserError(f"{self.rows.row_name(number)}: {error}") from None
        if unread := unread_pages(item):
            self._unread[number] = unread
        return item

    def _row(self, rows: RowFiles, number: int) -> dict:
        with self._lock:
            return next(_read(rows, number, number + 1))


def find_files(root: Path) -> tuple[list[Path], Counter]:
    """Return the images and PDF files in a folder, in natural order, and the number of files of each kind that are left out.

    Raises:
      UserError: a folder cannot be read.
    """

    def refuse(error: OSError):
        raise UserError(f"{error.filename} cannot be read ({error.strerror})")

    files, left_out, real = [], Counter(), root.resolve()
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        left_out.update({"links to folders": len(links)} if links else {})
        for name in names:
            if not name.startswith("."):
                file = Path(folder, name)
                kind = _left_out_as(file, real)
                files += [] if kind else [file]
                left_out.update([kind] if kind else [])
    return sorted(files, key=lambda file: natural_order(file.relative_to(root))), left_out


def natural_order(path: PurePath) -> tuple:
    """Return a key that sorts paths by the values of numbers in their names, and by letters of either case."""
    split_names = [re.split("([0-9]+)", name) for name in path.parts]  # text at even indices, numbers at odd ones
    return [[int(x) if index % 2 else x.casefold() for index, x in enumerate(name)] for name in split_names], path.parts


def _left_out_as(file: Path, root: Path) -> str:
    """Return the kind of file that a file is left out as; empty if it is a document.

    Args:
      root: the folder of all documents, without links.
    """
    if file.suffix.lower() not in ENDINGS | {".pdf"}:
        return f"files with the ending {file.suffix.lower()}" if file.suffix else "files without an ending"
    is_link = file.is_symlink()
    if not file.is_file():
        return "links and pipes that lead to no file"
    if is_link and not file.resolve().is_relative_to(root):
        return "links out of the folder"
    try:
        file.name.encode()
    except UnicodeEncodeError:
        return "files whose names are not valid Unicode"
    return ""


def _is_metadata(column: str, value: object) -> bool:
    """Return whether a column next to those that are encoded holds a value of JSON."""
    if column in COLUMNS or re.fullmatch(PANDAS_INDEX, column):
        return False
    try:
        return bool(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return False


def _read(rows: RowFiles, start: int, stop: int, columns: tuple[str, ...] | None = None) -> Iterator[dict]:
    """Yield rows start .. stop-1.

    Raises:
      UserError: a row cannot be read, or is no longer there.
    """
    for row in rows.read(start, stop, columns):
        yield row
        start += 1
    if start < stop:
        raise UserError(f"{rows.row_name(start)} is gone: the file has changed meanwhile; start again")


def _is_pdf(file: Path) -> bool:
    return file.suffix.lower() == ".pdf"
