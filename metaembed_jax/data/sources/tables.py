"""Rows of Parquet files and of JSON lines, read in order from anywhere in the table."""

import bisect
import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from metaembed_jax.errors import UserError

ROWS_AT_ONCE = 16  # of Parquet, because a row may hold images
LONGEST_LINE = 64 * 2**20  # bytes
MARKED = 256  # of so many lines, one has its place remembered


@dataclasses.dataclass(frozen=True)
class Table:
    """Files of rows, one after the other. Survives pickling, for worker processes.

    It keeps its place in the Parquet file that it read last: to go on from there is cheap, however large the file's row groups.

    Attributes:
      files: Parquet (`.parquet`), or JSON lines with any other ending.
      starts: of each file, the number of its first row; and that of all rows.
      marks: of each file of JSON lines, where rows 0, `MARKED`, 2 * `MARKED`, ... begin, in bytes.
    """

    files: tuple[Path, ...]
    starts: tuple[int, ...]
    marks: tuple[tuple[int, ...], ...]
    _opened: dict = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": {}}

    def __len__(self) -> int:
        return self.starts[-1]

    def columns(self) -> set[str]:
        """Of the first file; of JSON lines, the keys of its first row."""
        return read_columns(self.files[0])

    def place(self, row: int) -> str:
        """The name of a row in an error: its file, and its number there from 0."""
        number = max(number for number, start in enumerate(self.starts[:-1]) if start <= row)
        return f"{self.files[number]}, row {row - self.starts[number]}"

    def read(self, start: int, stop: int, columns: tuple[str, ...] | None = None) -> Iterator[dict]:
        """Rows start .. stop-1.

        Args:
          columns: of Parquet, those to read; all by default.

        Raises:
          UserError: a file that is not what its name says; names the row.
        """
        for file, first, behind, marks in zip(self.files, self.starts, self.starts[1:], self.marks, strict=False):
            lowest, highest = max(start, first) - first, min(stop, behind) - first
            if lowest < highest:
                if _is_parquet(file):
                    yield from self._open(file, columns).read(lowest, highest)
                else:
                    yield from _json_rows(file, lowest, highest, marks)

    def _open(self, file: Path, columns: tuple[str, ...] | None) -> "_ParquetRows":
        key = os.getpid(), file, columns  # a forked process opens files for itself
        if key not in self._opened:
            self._opened.clear()
            self._opened[key] = _ParquetRows(file, columns)
        return self._opened[key]


def open_table(files: Sequence[Path]) -> Table:
    """Counts the rows of files, which are taken in the given order.

    Raises:
      UserError: none, one that cannot be read, or no row in all of them.
    """
    starts, marks = [0], []
    for file in files:
        count, places = (_open_parquet(file).metadata.num_rows, ()) if _is_parquet(file) else _count_lines(file)
        starts.append(starts[-1] + count)
        marks.append(places)
    if not starts[-1]:
        raise UserError(f"{', '.join(map(str, files)) or 'no file'}: no rows to read")
    return Table(tuple(files), tuple(starts), tuple(marks))


def read_columns(file: Path) -> set[str]:
    """Of a Parquet file; of JSON lines, the keys of the first row.

    Raises:
      UserError: the file cannot be read.
    """
    if _is_parquet(file):
        return set(_open_parquet(file).schema_arrow.names)
    return set(next(_json_rows(file, 0, 1, (0,)), {}))


def new_id(value: str | int | None, column: str, seen: dict[str, int], table: Table, row: int) -> str:
    """An id as a text, if it is one, and is not among those `seen`, to which it is added.

    Raises:
      UserError: names both rows.
    """
    if not isinstance(value, str | int) or value == "":
        raise UserError(f"{table.place(row)}: {column} is {value!r}; it must be a text or a whole number")
    if str(value) in seen:
        raise UserError(f"{table.place(row)}: the {column} {value!r} is taken by {table.place(seen[str(value)])}; ids must differ")
    seen[str(value)] = row
    return str(value)


def _is_parquet(file: Path) -> bool:
    return file.suffix == ".parquet"


def _open_parquet(file: Path):
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(file, buffer_size=2**20)  # streams a row group rather than holding it
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: is no Parquet file that can be read ({_line(error)})") from error


class _ParquetRows:
    """The rows of one file. A row group can only be read from its beginning, so the place in it is kept."""

    def __init__(self, file: Path, columns: tuple[str, ...] | None):
        self.file, self.columns, self.opened = file, columns, _open_parquet(file)
        counts = (self.opened.metadata.row_group(group).num_rows for group in range(self.opened.num_row_groups))
        self.starts = list(itertools.accumulate(counts, initial=0))
        self.group, self.batches, self.batch, self.first = -1, None, None, 0

    def read(self, start: int, stop: int) -> Iterator[dict]:
        """Rows start .. stop-1. Several readers may take turns."""
        import pyarrow

        while start < stop:
            try:
                self._go_to(start)
                rows = self.batch.slice(start - self.first, stop - start).to_pylist()
            except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: bytes that are no text
                raise UserError(f"{self.file}, at row {start}: cannot be read ({_line(error)}); fetch the file again") from error
            yield from rows
            start += len(rows)

    def _go_to(self, row: int) -> None:
        """Makes `batch` the one that holds a row, and `first` its first row."""
        group = bisect.bisect_right(self.starts, row) - 1
        if group != self.group or row < self.first:
            self.batches = self.opened.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=self.columns)
            self.group, self.first, self.batch = group, self.starts[group], next(self.batches)
        while row >= self.first + self.batch.num_rows:
            following = next(self.batches, None)
            if following is None:
                raise OSError("the file has fewer rows than it says")
            self.first, self.batch = self.first + self.batch.num_rows, following


def _count_lines(file: Path) -> tuple[int, tuple[int, ...]]:
    count, places = 0, []
    for place, _ in _lines(file, 0):
        if count % MARKED == 0:
            places.append(place)
        count += 1
    return count, tuple(places)


def _json_rows(file: Path, start: int, stop: int, marks: Sequence[int]) -> Iterator[dict]:
    mark = start // MARKED
    for number, (_, line) in enumerate(_lines(file, marks[mark]), mark * MARKED):
        if number >= stop:
            return
        if number >= start:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}, row {number}: is no JSON ({_line(error)})") from error
            if not isinstance(row, dict):
                raise UserError(f"{file}, row {number}: is a {type(row).__name__}, not an object of columns and values")
            if b"\\u" in line and not _is_text(row):
                raise UserError(f"{file}, row {number}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no text")
            yield row


def _is_text(row: dict) -> bool:
    try:
        return bool(json.dumps(row, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        return False


def _lines(file: Path, start: int) -> Iterator[tuple[int, bytes]]:
    """(where it begins, line) of those from a byte on that are not blank."""
    try:
        with file.open("rb") as opened:
            place = opened.seek(start)
            while line := opened.readline(LONGEST_LINE):
                if len(line) == LONGEST_LINE:
                    raise UserError(f"{file}: has a line of {LONGEST_LINE} bytes or more; it should hold one JSON object a line")
                if line.strip():
                    yield place, line
                place += len(line)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
