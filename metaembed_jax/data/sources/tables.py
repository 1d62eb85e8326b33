"""Rows of Parquet files and of JSON lines, read in order from anywhere in the table."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from metaembed_jax.errors import UserError

ROWS_AT_ONCE = 16  # of Parquet, because a row may hold images
LONGEST_LINE = 64 * 2**20  # bytes
MARKED = 256  # of so many lines, one has its place remembered


@dataclasses.dataclass(frozen=True)
class Table:
    """Files of rows, one after the other. Survives pickling, for worker processes.

    Attributes:
      files: Parquet (`.parquet`), or JSON lines with any other ending.
      starts: of each file, the number of its first row; and that of all rows.
      marks: of each file of JSON lines, where rows 0, `MARKED`, 2 * `MARKED`, ... begin, in bytes.
    """

    files: tuple[Path, ...]
    starts: tuple[int, ...]
    marks: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return self.starts[-1]

    def columns(self) -> set[str]:
        """Of the first file; of JSON lines, the keys of its first row."""
        if _is_parquet(self.files[0]):
            return set(_open_parquet(self.files[0]).schema_arrow.names)
        return set(next(_json_rows(self.files[0], 0, 1, self.marks[0]), {}))

    def place(self, row: int) -> str:
        """The name of a row in an error: its file, and its number there from 0."""
        number = max(number for number, start in enumerate(self.starts[:-1]) if start <= row)
        return f"{self.files[number]}, row {row - self.starts[number]}"

    def read(self, start: int, stop: int) -> Iterator[dict]:
        """Rows start .. stop-1.

        Raises:
          UserError: a file that is not what its name says; names the row.
        """
        for file, first, behind, marks in zip(self.files, self.starts, self.starts[1:], self.marks, strict=False):
            lowest, highest = max(start, first) - first, min(stop, behind) - first
            if lowest < highest:
                yield from _parquet_rows(file, lowest, highest) if _is_parquet(file) else _json_rows(file, lowest, highest, marks)


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


def _is_parquet(file: Path) -> bool:
    return file.suffix == ".parquet"


def _open_parquet(file: Path):
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(file, buffer_size=2**20)  # streams a row group rather than holding it
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: is no Parquet file that can be read ({_line(error)})") from error


def _parquet_rows(file: Path, start: int, stop: int) -> Iterator[dict]:
    import pyarrow

    opened, first = _open_parquet(file), 0
    for group in range(opened.num_row_groups):
        count = opened.metadata.row_group(group).num_rows
        if first < stop and start < first + count:
            row = first
            try:
                for batch in opened.iter_batches(ROWS_AT_ONCE, row_groups=[group]):
                    lowest, highest = max(start - row, 0), min(stop - row, batch.num_rows)
                    if lowest < highest:
                        yield from batch.slice(lowest, highest - lowest).to_pylist()
                    row += batch.num_rows
            except (OSError, pyarrow.ArrowException) as error:
                raise UserError(f"{file}, at row {row}: cannot be read ({_line(error)}); fetch the file again") from error
        first += count


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
            except ValueError as error:
                raise UserError(f"{file}, row {number}: is no JSON ({_line(error)})") from error
            if not isinstance(row, dict):
                raise UserError(f"{file}, row {number}: is a {type(row).__name__}, not an object of columns and values")
            yield row


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
