"""Stamps: hashes of values, and of the path, size and time of files."""

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path


def file_stamp(file: Path, real: Callable = os.path.realpath) -> tuple | None:
    """Return the path, size and time of a file; None if it is missing.

    Args:
      real: for many files, `os.path.realpath` with a cache, because it asks the system for each folder of a path.
    """
    try:
        status = file.lstat()
        if stat.S_ISLNK(status.st_mode):
            status, path = file.stat(), os.path.realpath(file)
        else:
            path = os.path.join(real(file.parent), file.name)
    except OSError:
        return None
    return path, status.st_size, status.st_mtime_ns


def stamp_of(value: object) -> int:
    """Return a hash of numbers, texts, bytes, and of lists and dicts of them."""
    digest = hashlib.blake2b(digest_size=8)
    _update(digest, value)
    return int.from_bytes(digest.digest(), "little")


def _update(digest, value: object) -> None:
    if isinstance(value, bytes):
        digest.update(b"b%d:" % len(value))
        digest.update(value)
    elif isinstance(value, dict):
        _update(digest, sorted(value.items()))
    elif isinstance(value, list | tuple):
        digest.update(b"l%d:" % len(value))
        for part in value:
            _update(digest, part)
    else:
        digest.update(f"{value!r};".encode())  # repr escapes what UTF-8 cannot encode
