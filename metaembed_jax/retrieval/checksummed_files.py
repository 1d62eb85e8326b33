"""Memory-mapped files with checksums. Each chunk is checked when it is first read.

Checking a large index takes longer than a search in it. So every `CHUNK_BYTES` bytes of a file have a CRC-32. A search checks the
chunks that it reads, once, and `ChecksummedFile.check_all` checks the whole file.
"""

import mmap
import os
import stat
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int

from metaembed_jax.errors import UserError
from metaembed_jax.files import write_errors

CHUNK_BYTES = 64 * 1024  # small, because a search in stages reads scattered items and checks all bytes of their chunks
READS_BEFORE_RELEASE = 32  # scattered reads before memory is released: the system may map 2 MiB around each
RESIDENT_BYTES = 16 * 2**20  # a file up to this size may stay in memory


def count_chunks(size: int) -> int:
    """Return how many chunks a file of this size has."""
    return -(-size // CHUNK_BYTES)


class ChecksummedFile:
    """The bytes of a file as a read-only array [rows, ...].

    Args:
      path: path of the file; a file that is removed while it is open stays readable.
      crcs: CRC-32 of each chunk.
      size: expected size of the file in bytes.
      dtype: type of the array.
      row: shape of a row of the array.

    Raises:
      UserError: the path is not a file of this size.
      FileNotFoundError: the file is missing.
    """

    def __init__(self, path: Path, crcs: np.ndarray, size: int, dtype, row: tuple[int, ...] = ()):
        self.path, self._crcs = path, crcs
        self._content = map_file(path, size)
        self.row_bytes = np.dtype(dtype).itemsize * int(np.prod(row))
        self._numbers = np.frombuffer(self._content, np.uint8).view(dtype)
        self._array = self._numbers.reshape(-1, *row)
        # A maximum may hide NaN, so numbers are checked when they are first read, like checksums.
        self._is_float = self._numbers.dtype.kind not in "iu"  # also bfloat16
        self._in_chunk = CHUNK_BYTES // self._numbers.dtype.itemsize
        self._is_checked = np.zeros(len(crcs), bool)

    def __len__(self) -> int:
        return len(self._array)

    @property
    def dtype(self) -> np.dtype:
        """Type of the array."""
        return self._array.dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows start .. stop-1, without a copy.

        Raises:
          UserError: they are damaged, or NaN or infinite.
        """
        first, end = start * self.row_bytes // CHUNK_BYTES, count_chunks(stop * self.row_bytes)
        self._check(first + np.flatnonzero(~self._is_checked[first:end]))
        return self._array[start:stop]

    def take(self, rows: Int[np.ndarray, " n"]) -> np.ndarray:
        """Return a copy of some rows.

        Raises:
          UserError: they are damaged, or NaN or infinite.
        """
        first, last = rows * self.row_bytes // CHUNK_BYTES, ((rows + 1) * self.row_bytes - 1) // CHUNK_BYTES
        chunks = np.unique(np.minimum(first[:, None] + np.arange(int((last - first).max(initial=0)) + 1), last[:, None]))
        self._check(chunks[~self._is_checked[chunks]])
        if len(self._content) <= RESIDENT_BYTES:
            return self._array[rows]
        copy = np.empty((len(rows), *self._array.shape[1:]), self._array.dtype)
        for start in range(0, len(rows), READS_BEFORE_RELEASE):
            copy[start : start + READS_BEFORE_RELEASE] = self._array[rows[start : start + READS_BEFORE_RELEASE]]
            self.release()
        return copy

    def check_all(self) -> None:
        """Check all chunks, also those that were checked before.

        Raises:
          UserError: a chunk is damaged.
        """
        self._check(np.arange(len(self._crcs)))

    def release(self) -> None:
        """Release the memory that a large file fills; the system reads the file again when needed."""
        if isinstance(self._content, mmap.mmap) and len(self._content) > RESIDENT_BYTES:
            self._content.madvise(mmap.MADV_DONTNEED)

    def _is_finite(self, chunk: int) -> bool:
        with np.errstate(invalid="ignore"):  # bfloat16 warns of some kinds of NaN
            return bool(np.isfinite(self._numbers[chunk * self._in_chunk : (chunk + 1) * self._in_chunk]).all())

    def _check(self, chunks: np.ndarray) -> None:
        content = memoryview(self._content)
        for reads, chunk in enumerate(chunks.tolist(), 1):
            if zlib.crc32(content[chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES]) != self._crcs[chunk]:
                raise UserError(
                    f"{self.path} is damaged near byte {chunk * CHUNK_BYTES}: its checksum does not match; "
                    "copy the index again, or build it again"
                )
            if self._is_float and not self._is_finite(chunk):
                raise UserError(f"{self.path} has NaN or infinities near byte {chunk * CHUNK_BYTES}; build the index again")
            self._is_checked[chunk] = True
            if reads % READS_BEFORE_RELEASE == 0:
                self.release()


def map_file(path: Path, size: int) -> mmap.mmap | bytes:
    """Map the content of a file into memory.

    Raises:
      UserError: as `open_regular`, or the file has another size.
      FileNotFoundError: the file is missing.
    """
    with open_regular(path) as file:
        actual = os.fstat(file.fileno()).st_size
        if actual != size:
            raise UserError(f"{path} is damaged: it has {actual} bytes, expected {size}; build the index again")
        if size == 0:
            return b""  # an empty file cannot be mapped
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. Links are refused, because all files of an index are in its own folder.

    Raises:
      UserError: the path is not a file, or cannot be read.
      FileNotFoundError: the file is missing.
    """
    try:
        file = open(path, "rb", opener=_open)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{path} cannot be read: it is not a file")
    return file


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)  # O_NONBLOCK: a pipe would wait for its writer


class ChecksummedWriter:
    """Writes a new file, and computes the CRC-32 of each of its chunks.

    Raises:
      UserError: from every method, if the disk is full or cannot be written.
    """

    def __init__(self, path: Path):
        self.path, self.size, self.crcs = path, 0, []
        with write_errors(path):
            self._file = path.open("xb")

    def write(self, data) -> None:
        """Append bytes, or the bytes of an array."""
        data = np.ascontiguousarray(data).view(np.uint8).reshape(-1).data if isinstance(data, np.ndarray) else memoryview(data)
        with write_errors(self.path):
            self._file.write(data)
        while len(data):
            space = -self.size % CHUNK_BYTES or CHUNK_BYTES
            if space == CHUNK_BYTES:
                self.crcs.append(0)
            self.crcs[-1] = zlib.crc32(data[:space], self.crcs[-1])
            self.size += len(data[:space])
            data = data[space:]

    def close(self) -> None:
        """Close the file. Its content is on the disk when this returns."""
        with write_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
