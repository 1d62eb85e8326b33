"""Rows of Parquet files and of JSON lines, read in order from any row on."""

import bisect
import codecs
import dataclasses
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from metaembed_jax.errors import UserError, one_line, printable

ROWS_AT_ONCE = 16  # of Parquet, because a row may hold images
UTF_16 = (b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{")  # the first bytes of a file, with and without a byte order mark
LONGEST_LINE = 64 * 2**20  # bytes
PANDAS_INDEX = "__index_level_[0-9]+__"  # a column
LINES_PER_OFFSET = 256  # the offset of every 256th line is stored


class Rows(Protocol):
    """Rows in a fixed order. Can be pickled, for worker processes. `RowFiles` has those of Parquet and of JSON lines."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read; other files, or changed ones, are other rows."""
        ...

    def __len__(self) -> int: ...

    def row_name(self, row: int) -> str:
        """Return the name of a row for errors: its file, and its number there."""
        ...

    def read(self, start: int, stop: int) -> Iterator[dict]:
        """Yield rows start .. stop-1.

        Raises:
          UserError: a row that cannot be read; names it.
        """
        ...


@dataclasses.dataclass(frozen=True)
class RowFiles:
    """Files of rows, one after the other. Can be pickled, for worker processes.

    The last Parquet file stays open at the last row that was read: to read on is cheap, however large its row groups are.

    Attributes:
      files: Parquet (`.parquet`), or JSON lines with any other ending.
      starts: the number of each file's first row, then the number of all rows.
      offsets: for each file of JSON lines, the bytes at which rows 0, `LINES_PER_OFFSET`, 2 * `LINES_PER_OFFSET`, ... begin.
    """

    files: tuple[Path, ...]
    starts: tuple[int, ...]
    offsets: tuple[tuple[int, ...], ...]
    _opened: dict = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": {}}

    def __len__(self) -> int:
        return self.starts[-1]

    def columns(self) -> set[str]:
        """Return the columns of the first file; of JSON lines, the keys of its first row."""
        return read_columns(self.files[0])

    def row_name(self, row: int) -> str:
        """Return the name of a row for errors: its file, and its number there from 0."""
        number = max(number for number, start in enumerate(self.starts[:-1]) if start <= row)
        return f"{self.files[number]}, row {row - self.starts[number]}"

    def read(self, start: int, stop: int, columns: tuple[str, ...] | None = None) -> Iterator[dict]:
        """Yield rows start .. stop-1.

        Args:
          columns: the columns to read, of Parquet; all by default.

        Raises:
          UserError: a file has another format than its name says; names the row.
        """
        for file, first, end, offsets in zip(self.files, self.starts, self.starts[1:], self.offsets, strict=False):
            lowest, highest = max(start, first) - first, min(stop, end) - first
            if lowest < highest:
                if _is_parquet(file):
                    yield from self._open(file, columns).read(lowest, highest)
                else:
                    yield from _json_rows(file, lowest, highest, offsets)

    def _open(self, file: Path, columns: tuple[str, ...] | None) -> "_ParquetRows":
        key = os.getpid(), file, columns  # a forked process opens files for itself
        if key not in self._opened:
            self._opened.clear()
            self._opened[key] = _ParquetRows(file, columns)
        return self._opened[key]


def read_each(read: Callable[[int, int], Iterator[dict]], start: int, stop: int) -> Iterator[tuple[int, dict | UserError]]:
    """Yield (number, row) of rows start .. stop-1; in place of a row that cannot be read, what is wrong with it.

    Args:
      read: as `Rows.read`.
    """
    while start < stop:
        try:
            for row in read(start, stop):
                yield start, row
                start += 1
            return
        except UserError as error:
            yield start, error
            start += 1  # the rows after it are read again


def open_row_files(files: Sequence[Path]) -> RowFiles:
    """Count the rows of files, in the given order.

    Raises:
      UserError: there are no files or no rows, or a file cannot be read.
    """
    starts, offsets = [0], []
    for file in files:
        rows, file_offsets = (_open_parquet(file).metadata.num_rows, ()) if _is_parquet(file) else _count_lines(file)
        starts.append(starts[-1] + rows)
        offsets.append(file_offsets)
    if not starts[-1]:
        raise UserError(f"{', '.join(map(str, files)) or 'no file'}: no rows to read")
    return RowFiles(tuple(files), tuple(starts), tuple(offsets))


def read_columns(file: Path) -> set[str]:
    """Return the columns of a Parquet file; of JSON lines, the keys of the first row.

    Raises:
      UserError: the file cannot be read.
    """
    if _is_parquet(file):
        return set(_open_parquet(file).schema_arrow.names)
    return set(next(_json_rows(file, 0, 1, (0,)), {}))


def further_columns(rows: RowFiles, read: set[str]) -> list[str]:
    """Return the columns of the first file that are not in `read`, sorted, without the index that pandas adds to a file."""
    return sorted(name for name in rows.columns() - read if not re.fullmatch(PANDAS_INDEX, name))


def print_further_columns(rows: RowFiles, read: set[str], use: str) -> None:
    """Print the columns that are not in `read`, with what becomes of them: one of them may be a misspelled name."""
    if further := further_columns(rows, read):
        print(f"{rows.files[0]}: columns {use}: {', '.join(map(printable, further))}; read: {', '.join(sorted(read))}", flush=True)


def check_columns(rows: RowFiles, names: Sequence[str]) -> None:
    """Check that each file has these columns.

    Raises:
      UserError: names the file and its columns.
    """
    for file in rows.files:
        columns = read_columns(file)
        if missing := [name for name in names if name not in columns]:
            raise UserError(f"{file} lacks the column {', '.join(missing)}; it has {', '.join(sorted(columns))}")


def unique_id(value: str | int | None, column: str, seen: dict[str, int], rows: Rows, row: int) -> str:
    """Return the id of a row as a string, and add it to those `seen`, with its row.

    Raises:
      UserError: the id is empty, of another type, or that of an earlier row; names both rows.
    """
    if not isinstance(value, str | int) or value == "":
        raise UserError(f"{rows.row_name(row)}: {column} is {value!r}; expected a string or an integer")
    if str(value) in seen:
        raise UserError(
            f"{rows.row_name(row)}: the {column} {value!r} is taken by {rows.row_name(seen[str(value)])}; ids must differ"
        )
    seen[str(value)] = row
    return str(value)


def _is_parquet(file: Path) -> bool:
    return file.suffix.lower() == ".parquet"


def _open_parquet(file: Path):
    import pyarrow
    from pyarrow import parquet

    try:
        opened = parquet.ParquetFile(file, buffer_size=2**20)  # streams a row group, instead of holding it
        names = opened.schema_arrow.names
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: names that are not UTF-8
        raise UserError(f"{file} is not a readable Parquet file ({one_line(error)})") from error
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{file} has two columns of the name {twice[0]!r}; rename or remove one")
    return opened


class _ParquetRows:
    """The rows of one file. A row group can only be read from its first row, so the last batch of rows is kept."""

    def __init__(self, file: Path, columns: tuple[str, ...] | None):
        self.file, self.columns, self.opened = file, columns, _open_parquet(file)
        rows = (self.opened.metadata.row_group(group).num_rows for group in range(self.opened.num_row_groups))
        self.starts = list(itertools.accumulate(rows, initial=0))
        self.group, self.batches, self.batch, self.first = -1, iter(()), None, 0

    def read(self, start: int, stop: int) -> Iterator[dict]:
        """Yield rows start .. stop-1. Several readers may take turns."""
        import pyarrow

        while start < stop:
            try:
                batch = self._batch_of(start)
                rows = batch.slice(start - self.first, stop - start).to_pylist()
            except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: bytes that are not UTF-8
                message = f"{self.file}, row {start} cannot be read ({one_line(error)}); fetch the file again"
                raise UserError(message) from error
            yield from rows
            start += len(rows)

    def _batch_of(self, row: int):
        """Return the batch that holds a row; `first` is then its first row."""
        group, batch = bisect.bisect_right(self.starts, row) - 1, self.batch
        if batch is None or group != self.group or row < self.first:
            self.batches = self.opened.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=self.columns)
            batch = self._next_batch()
            self.group, self.first, self.batch = group, self.starts[group], batch
        while row >= self.first + batch.num_rows:
            following = self._next_batch()
            self.first, self.batch = self.first + batch.num_rows, following
            batch = following
        return batch

    def _next_batch(self):
        batch = next(self.batches, None)
        if batch is None:
            raise OSError("the file has fewer rows than it says")
        return batch


def _count_lines(file: Path) -> tuple[int, tuple[int, ...]]:
    count, offsets = 0, []
    for offset, _ in _lines(file, 0):
        if count % LINES_PER_OFFSET == 0:
            offsets.append(offset)
        count += 1
    return count, tuple(offsets)


def _json_rows(file: Path, start: int, stop: int, offsets: Sequence[int]) -> Iterator[dict]:
    first = start // LINES_PER_OFFSET
    for number, (_, line) in enumerate(_lines(file, offsets[first]), first * LINES_PER_OFFSET):
        if number >= stop:
            return
        if number >= start:
            try:
                row = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}, row {number} is not JSON ({one_line(error)})") from error
            if not isinstance(row, dict):
                raise UserError(f"{file}, row {number}: expected an object of columns and values, not a {type(row).__name__}")
            if b"\\u" in line and not _is_unicode(row):
                raise UserError(f"{file}, row {number} has a lone surrogate (\\ud800 to \\udfff), which is not valid Unicode")
            yield row


def _is_unicode(row: dict) -> bool:
    try:
        return bool(json.dumps(row, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        return False


def _lines(file: Path, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line) of each line that is not blank, from the byte `start` on."""
    try:
        with file.open("rb") as opened:
            offset = opened.seek(start)
            while line := opened.readline(LONGEST_LINE):
                if offset == 0 and line.startswith(UTF_16):
                    raise UserError(f"{file} is in UTF-16; save it as UTF-8")
                if len(line) == LONGEST_LINE:
                    raise UserError(f"{file} has a line of {LONGEST_LINE} bytes or more; expected one JSON object a line")
                text = line if offset else line.removeprefix(codecs.BOM_UTF8)
                if text.strip():
                    yield offset, text
                offset += len(line)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from error
