"""Columns of metadata in Arrow, by which searches filter.

The metadata of a segment are written in blocks. For each key and kind of value in a block, the file `columns` has one stream in
Arrow's IPC format: a record batch of the rows that have such a value, ascending, and of the values. Keys that few items have take
little space. The file `column-index` is a JSON object:

    "columns"    [[key, kind, first byte, end], ...], a stream each
    "nested"     keys of lists and objects, which have no column
    "has_more"   true if there are more keys than MOST_KEYS; those have no column

N items of the segment, n values of a stream.
"""

import functools
import json
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import UInt32

from metaembed_jax.errors import UserError
from metaembed_jax.retrieval.checksummed_files import ChecksummedFile, ChecksummedWriter

if TYPE_CHECKING:
    import pyarrow

MOST_KEYS = 1000  # of a segment that have columns, in the order of its items: a stream takes 400 bytes more than its values
BLOCK_ITEMS, BLOCK_CHARACTERS = 2**16, 2**22  # of metadata that are in memory at once, or of one call of `ColumnWriter.add`
# The kinds of values. Texts are UTF-8, also of halves of surrogate pairs, which JSON allows. "long" are integers beyond 64 bits, in
# hexadecimal digits.
TEXT, BOOL, INT, FLOAT, LONG = "text", "bool", "int", "float", "long"
KINDS = (TEXT, BOOL, INT, FLOAT, LONG)
Scalar = str | bool | int | float
INT_MIN, INT_MAX = -(2**63), 2**63 - 1


class Values(NamedTuple):
    """The values of one kind that some items have of a key.

    Attributes:
      kind: one of `KINDS`.
      rows: of the items in the segment.
      values: an Arrow array of texts, as `encode_text` makes them; a NumPy array of other kinds, of Python's integers for LONG.
    """

    kind: str
    rows: UInt32[np.ndarray, " n"]
    values: Any


class ColumnWriter:
    """The columns of a segment that is written block by block.

    Args:
      file: the file `columns`, which the caller closes.
    """

    def __init__(self, file: ChecksummedWriter):
        self._file, self._first_row = file, 0
        self._texts: list[str] = []
        self._characters, self._has_more = 0, False
        self._keys: set[str] = set()
        self._nested: set[str] = set()
        self._streams: list[tuple[str, str, int, int]] = []

    def add(self, texts: Sequence[str]) -> None:
        """Append the metadata of items, a JSON object each.

        Raises:
          UserError: a text is something else.
        """
        self._texts += texts
        self._characters += sum(map(len, texts))
        if len(self._texts) >= BLOCK_ITEMS or self._characters >= BLOCK_CHARACTERS:
            self._flush()

    def close(self) -> bytes:
        """Write the last block, and return the content of the file `column-index`."""
        self._flush()
        index = {"columns": self._streams, "nested": sorted(self._nested), "has_more": self._has_more}
        return json.dumps(index).encode()

    def _flush(self) -> None:
        """Write the columns of a block."""
        columns: dict[tuple[str, str], tuple[list[int], list]] = {}
        for row, text in enumerate(self._texts, self._first_row):
            for key, value in parse_metadata(text, "metadata").items():
                if value is None or not self._is_column(key):
                    continue
                if isinstance(value, list | dict):
                    self._nested.add(key)
                    continue
                rows, values = columns.setdefault((key, kind_of(value)), ([], []))
                rows.append(row)
                values.append(value)
        for (key, kind), (rows, values) in columns.items():
            start = self._file.size
            self._file.write(_encode(kind, rows, values))
            self._streams.append((key, kind, start, self._file.size))
        self._first_row += len(self._texts)
        self._texts, self._characters = [], 0

    def _is_column(self, key: str) -> bool:
        if key not in self._keys:
            if len(self._keys) == MOST_KEYS:
                self._has_more = True
                return False
            self._keys.add(key)
        return True


class Columns:
    """The columns of a segment. A stream is read and checked when a filter needs it.

    Args:
      file: the file `columns`.
      index: the file `column-index`.
      items: number of items of the segment.
    """

    def __init__(self, file: ChecksummedFile, index: ChecksummedFile, items: int):
        self._file, self._index, self._items = file, index, items

    @functools.cached_property
    def kinds(self) -> dict[str, set[str]]:
        """The kinds of the values of each key that has a column."""
        return {key: {kind for kind, _, _ in streams} for key, streams in self._content[0].items()}

    @property
    def nested(self) -> set[str]:
        """Keys of lists and objects."""
        return self._content[1]

    @property
    def has_more(self) -> bool:
        """True if there are further keys, which have no column."""
        return self._content[2]

    def read(self, key: str, kinds: Collection[str]) -> Iterator[Values]:
        """Yield the values of a key, of some kinds, a stream at a time.

        Raises:
          UserError: a file is damaged.
        """
        import pyarrow

        for kind, start, end in self._content[0].get(key, ()):
            if kind in kinds:
                content = self._file.read(start, end)
                try:
                    yield self._decode(kind, content)
                # StopIteration: a stream without a batch. KeyError, TypeError: unknown types.
                except (pyarrow.ArrowException, OSError, ValueError, StopIteration, KeyError, TypeError) as error:
                    raise UserError(f"{self._file.path}: the column {key!r} is not valid; build the index again") from error

    def release(self) -> None:
        """Release the memory that the file fills."""
        self._file.release()

    def _decode(self, kind: str, content: np.ndarray) -> Values:
        import pyarrow

        with pyarrow.ipc.open_stream(pyarrow.py_buffer(content)) as stream:
            if stream.schema != _schema(kind):
                raise ValueError("another schema")
            batch = stream.read_next_batch()
        batch.validate(full=True)  # another program may have written a stream with matching checksums
        if any(column.null_count for column in batch.columns) or (batch.column(0).to_numpy() >= self._items).any():
            raise ValueError("nulls or rows")
        values = batch.column(1)
        if kind == LONG:
            values = np.array([*(int(digits, 16) for digits in values.to_pylist()), None], object)[:-1]
        elif kind != TEXT:
            values = values.to_numpy(zero_copy_only=kind != BOOL)
        return Values(kind, batch.column(0).to_numpy(), values)

    @functools.cached_property
    def _content(self) -> tuple[dict[str, list[tuple[str, int, int]]], set[str], bool]:
        """The streams of each key, the nested keys, and `has_more`.

        Raises:
          UserError: the file is damaged.
        """
        try:
            index = json.loads(self._index.read(0, len(self._index)).tobytes())
            streams: dict[str, list[tuple[str, int, int]]] = {}
            for key, kind, start, end in index["columns"]:
                is_range = type(start) is int and type(end) is int and 0 <= start <= end <= len(self._file)
                if not isinstance(key, str) or kind not in KINDS or not is_range:
                    raise ValueError("columns")
                streams.setdefault(key, []).append((kind, start, end))
            nested, has_more = set(index["nested"]), index["has_more"]
            if type(has_more) is not bool or not all(isinstance(key, str) for key in nested):
                raise ValueError("nested or has_more")
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{self._index.path} is not valid; build the index again") from error
        return streams, nested, has_more


def kind_of(value: Scalar) -> str:
    """Return the kind of a value."""
    if isinstance(value, bool):  # first, because Python's bool is an int
        return BOOL
    if isinstance(value, int):
        return INT if INT_MIN <= value <= INT_MAX else LONG
    return FLOAT if isinstance(value, float) else TEXT


def encode_text(text: str) -> bytes:
    """Return the bytes of a text in a column. They are ordered as the texts are."""
    return text.encode(errors="surrogatepass")


def parse_metadata(text: str, name: object) -> dict[str, Any]:
    """Return the metadata of an item.

    Args:
      name: of the file that has the text, for errors.

    Raises:
      UserError: the text is not a JSON object.
    """
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise UserError(f"{name}: {text[:50]!r}: expected a JSON object; build the index again")
    return metadata


def _encode(kind: str, rows: list[int], values: list):
    """Return a stream of Arrow with a single batch."""
    import pyarrow

    encode = {TEXT: encode_text, LONG: lambda number: hex(number).encode()}.get(kind)
    schema = _schema(kind)
    arrays = [pyarrow.array(rows, schema[0].type), pyarrow.array([*map(encode, values)] if encode else values, schema[1].type)]
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, schema) as stream:
        stream.write_batch(pyarrow.record_batch(arrays, schema))
    return sink.getvalue()


def _schema(kind: str) -> "pyarrow.Schema":
    import pyarrow

    types = {BOOL: pyarrow.bool_(), INT: pyarrow.int64(), FLOAT: pyarrow.float64()}
    return pyarrow.schema([("row", pyarrow.uint32()), ("value", types.get(kind, pyarrow.large_binary()))])
