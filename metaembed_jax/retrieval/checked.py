"""Files that are read in place, memory-mapped, and checked piece by piece when a piece is first read.

Reading all of a large index to check it would take longer than to search it. So every `PIECE` bytes of a file have a CRC-32: a
search checks what it reads, once, and `CheckedFile.check_all` checks the rest.
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

# A search in stages reads single items from all over: small pieces, so that it checks little beside them.
PIECE = 64 * 1024
# Places that are read before their memory is given back: the system may map 2 MiB around each.
SCATTERED = 32
KEPT = 16 * 2**20  # a file of so few bytes may stay in memory


def pieces(size: int) -> int:
    """How many pieces so many bytes have."""
    return -(-size // PIECE)


class CheckedFile:
    """The bytes of a file as an array [rows, ...], read-only.

    Args:
      path: the file; it may be removed while it is open, and stays readable.
      crcs: CRC-32 of each piece.
      dtype, row: of the array, and the shape of one of its rows.
      size: bytes that the file must have.

    Raises:
      UserError: it is no file of this size.
      FileNotFoundError: there is none.
    """

    def __init__(self, path: Path, crcs: np.ndarray, size: int, dtype, row: tuple[int, ...] = ()):
        self.path, self._crcs = path, crcs
        self._content = map_file(path, size)
        self._bytes = np.frombuffer(self._content, np.uint8)
        self.row_bytes = np.dtype(dtype).itemsize * int(np.prod(row))
        self._array = self._bytes.view(dtype).reshape(-1, *row)
        self._is_good = np.zeros(len(crcs), bool)

    def __len__(self) -> int:
        return len(self._array)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start .. stop-1, in place.

        Raises:
          UserError: they are damaged.
        """
        first, last = start * self.row_bytes // PIECE, pieces(stop * self.row_bytes)
        self._check(first + np.flatnonzero(~self._is_good[first:last]))
        return self._array[start:stop]

    def take(self, rows: Int[np.ndarray, " n"]) -> np.ndarray:
        """A copy of some rows.

        Raises:
          UserError: they are damaged.
        """
        first, last = rows * self.row_bytes // PIECE, pieces((rows + 1) * self.row_bytes) - 1
        touched = np.unique(np.minimum(first[:, None] + np.arange(int((last - first).max(initial=0)) + 1), last[:, None]))
        self._check(touched[~self._is_good[touched]])
        if len(self._content) <= KEPT:
            return self._array[rows]
        found = np.empty((len(rows), *self._array.shape[1:]), self._array.dtype)
        for start in range(0, len(rows), SCATTERED):
            found[start : start + SCATTERED] = self._array[rows[start : start + SCATTERED]]
            self.release()
        return found

    def check_all(self) -> None:
        """Reads everything, whether or not it was checked before.

        Raises:
          UserError: a piece is damaged.
        """
        self._check(np.arange(len(self._crcs)))

    def release(self) -> None:
        """Gives the memory back that reading a large file has filled; the system reads again when it is needed."""
        if len(self._content) > KEPT:
            self._content.madvise(mmap.MADV_DONTNEED)

    def _check(self, numbers: np.ndarray) -> None:
        for place, number in enumerate(numbers.tolist(), 1):
            if zlib.crc32(self._bytes[number * PIECE : (number + 1) * PIECE]) != self._crcs[number]:
                raise UserError(
                    f"{self.path} is damaged near byte {number * PIECE}: its checksum does not fit; "
                    "copy the index again, or build it again"
                )
            self._is_good[number] = True
            if place % SCATTERED == 0:
                self.release()


def map_file(path: Path, size: int) -> mmap.mmap | bytes:
    """The content of a file, mapped into memory; raises as `open_regular`."""
    with open_regular(path) as file:
        found = os.fstat(file.fileno()).st_size
        if found != size:
            raise UserError(f"{path} is damaged: it has {found} bytes and not {size}; build the index again")
        if size == 0:
            return b""  # which cannot be mapped
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)


def open_regular(path: Path) -> BinaryIO:
    """Opens a file to read. No link is followed: a file of an index lies in its folder.

    Raises:
      UserError: it is something else, or cannot be read.
      FileNotFoundError: there is none.
    """
    try:
        file = open(path, "rb", opener=_open)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{path} cannot be read (it is no file)")
    return file


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would wait for one who writes


class CheckedWriter:
    """A new file, and the CRC-32 of each of its pieces.

    Raises:
      UserError: from all that it does, where the disk is full or cannot be written.
    """

    def __init__(self, path: Path):
        self.path, self.size, self.crcs = path, 0, []
        with write_errors(path):
            self._file = path.open("xb")

    def write(self, data) -> None:
        """Appends bytes, or an array's."""
        data = memoryview(np.ascontiguousarray(data).view(np.uint8).reshape(-1) if isinstance(data, np.ndarray) else data)
        with write_errors(self.path):
            self._file.write(data)
        while len(data):
            room = -self.size % PIECE or PIECE
            if room == PIECE:
                self.crcs.append(0)
            self.crcs[-1] = zlib.crc32(data[:room], self.crcs[-1])
            self.size += len(data[:room])
            data = data[room:]

    def close(self) -> None:
        """What was written is on the disk when this returns."""
        with write_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
