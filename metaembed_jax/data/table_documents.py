"""Documents of a table: rows of texts and images."""

import dataclasses
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from jaxtyping import UInt64
from tqdm import tqdm

from metaembed_jax.data.document_sequence import Documents
from metaembed_jax.data.left_out import LeftOut, check_left_out
from metaembed_jax.data.sources.image_files import ImageFolder, image_path, unread_pages
from metaembed_jax.data.sources.row_files import PANDAS_INDEX, RowFiles, print_further_columns, read_each, unique_id
from metaembed_jax.data.stamps import file_stamp, stamp_of
from metaembed_jax.errors import UserError

COLUMNS = {"id", "text", "image"}


class TableDocuments(Documents):
    """Rows of a table. A row's id is in its column `id`; in a table without that column, it is the row's number from 0.

    A row that cannot be read, up to `skip` of them, is a document that cannot be read, with the id "row N of FILE".
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
                left_out.append(LeftOut(f"row {number} of {self.rows.files[0].name}", str(row)))
                check_left_out(left_out[:1], skip)  # without skip, at once
            value = left_out[-1].id if isinstance(row, UserError) else row.get("id")
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
        path = os.path.abspath(self.folder.root / image) if image else None  # the index may be searched from another folder
        further = {name: _json_value(value) for name, value in row.items() if _is_metadata(name)}
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


def _is_metadata(column: str) -> bool:
    """Return whether a column is kept next to those that are encoded."""
    return column not in COLUMNS and not re.fullmatch(PANDAS_INDEX, column)


def _json_value(value: object) -> object:
    """Return a value of JSON: dates, decimals and others that JSON lacks as text; None for NaN and bytes, which are not kept."""
    try:
        return json.loads(json.dumps(value, allow_nan=False, default=_as_text))
    except (TypeError, ValueError, RecursionError):
        return None


def _as_text(value: object) -> str:
    if isinstance(value, bytes):
        raise TypeError("bytes are not text")
    return str(value)


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
