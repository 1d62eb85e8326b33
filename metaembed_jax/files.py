"""Files of any kind: paths, atomic writes, JSON, digests, and locks.

A path is a `pathlib.Path`, or in a bucket (gs://...) an `epath.Path`, which has the same methods. On a disk a file is written under
another name and renamed; in a bucket an object appears whole or not at all, so one put is enough.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from metaembed_jax.errors import UserError, one_line

BUCKET, PART = "gs://", ".part"
LAST = ("README.md", "config.json", "adapter_config.json")  # mark a folder as a model, so they are uploaded last
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of a file system without locks, such as a mounted bucket
SPECIAL = "?#%|[]*"  # special in URLs and patterns: gcsfs, Orbax and TensorStore would then read and write at different paths
REMOTE = {"gcsfs", "google", "aiohttp", "requests", "fsspec"}  # packages whose errors speak of a bucket


def any_path(path: str | os.PathLike) -> Path:
    """Return a path on a disk or in a bucket.

    Raises:
      UserError: it has another scheme than gs://, or gcsfs is not installed.
    """
    text = check_scheme(os.fspath(path))
    if not is_bucket(text):
        return Path(text)
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text} needs gcsfs, which is not installed: pip install 'metaembed-jax[gcs]'")
    return _bucket_path(text)


def local_path(path: str | os.PathLike) -> Path:
    """Return a path on a disk, for data and indexes: they are memory-mapped, or written by libraries that know no buckets.

    Raises:
      UserError: it is not a path, or is in a bucket; gives the commands that mount or copy it.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"{path!r}: expected a path")
    text = check_scheme(os.fspath(path))
    if is_bucket(text):
        bucket = text.removeprefix(BUCKET).partition("/")[0]
        raise UserError(
            f"{text}: data and indexes must be on a disk; copy it, `gcloud storage cp -r {text} DIR`, "
            f"or mount the bucket to read it, `gcsfuse --implicit-dirs {bucket} DIR`"
        )
    return Path(text)


def check_scheme(text: str) -> str:
    """Check a path, or the id of a model, and return it unchanged.

    Raises:
      UserError: another scheme than gs://, gs:/ (which `pathlib.Path` makes of gs://), a whole bucket, or a name in it that
        libraries read differently.
    """
    if re.match("gs:/(?!/)", text):
        raise UserError(f"{text}: expected gs://BUCKET/PATH; pathlib.Path drops a slash, so give a str")
    bucket = text.removeprefix(BUCKET) if is_bucket(text) else None
    if "://" in (text if bucket is None else bucket):
        raise UserError(f"{text}: expected a folder or gs://BUCKET/PATH; no other scheme is read or written")
    if bucket is not None and not bucket.partition("/")[0]:
        raise UserError(f"{text} has no name of a bucket; expected gs://BUCKET/PATH")
    if bucket is not None:
        _check_names(text, bucket.partition("/")[2].rstrip("/").split("/"))
    return text


def _check_names(text: str, names: list[str]) -> None:
    if names == [""]:
        raise UserError(f"{text} is a whole bucket; expected gs://BUCKET/PATH")
    for name in names:
        if name in ("", ".", "..") or not name.isprintable() or any(char in SPECIAL for char in name):
            raise UserError(f"{text}: expected names in the bucket without {' '.join(SPECIAL)}, and none that is empty, . or ..")


def is_bucket(path: str | os.PathLike) -> bool:
    """Return whether a path is in a bucket."""
    return os.fspath(path).startswith(BUCKET)


def absolute(path: Path) -> Path:
    """Return the absolute path; one in a bucket is absolute, but its own `absolute` fails."""
    return path if is_bucket(path) else path.absolute()


def _bucket_path(text: str) -> Path:
    # TensorFlow, where a notebook has it, would be imported for its file system and take the devices' memory.
    os.environ.setdefault("EPATH_USE_TF", "false")
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks for the layout of each bucket, by another protocol
    from etils import epath
    from fsspec.config import conf as fsspec_conf

    fsspec_conf.setdefault("gcs", {}).setdefault("cache_timeout", 0)  # other hosts change what a folder lists
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints the traceback of each error that it raises
    return epath.Path(text)  # pyright: ignore[reportReturnType]  not a subclass, but it has the same methods


def bucket_file_system():
    """Return the `GCSFileSystem` that reads and writes buckets."""
    import fsspec

    return fsspec.filesystem("gcs", finalize_on_close=True)  # the instance that epath uses


def check_bucket(path: Path) -> None:
    """Check that the bucket of a path exists and lists its objects; do nothing for a path on a disk.

    Raises:
      UserError: it does not exist or does not answer, or access is denied.
    """
    if not is_bucket(path):
        return
    bucket = os.fspath(path).removeprefix(BUCKET).partition("/")[0]
    try:
        bucket_file_system().call("GET", "b/{}/o", bucket, maxResults=1)
    except Exception as error:
        if (reason := bucket_reason(error)) is None:
            raise
        raise UserError(f"{BUCKET}{bucket}: {reason}") from error


def check_writable(folder: Path) -> None:
    """Check that a folder on a disk exists and can be written, or can be made; do nothing for a path in a bucket.

    Raises:
      UserError: it cannot; names the folder that is in the way.
    """
    if is_bucket(folder):
        return
    parent = existing_parent(folder)
    if not parent.is_dir():
        raise UserError(f"{parent} is a file; expected a folder, or choose another path than {folder}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"no permission to write to {parent}; choose another folder than {folder}")


def existing_parent(path: Path) -> Path:
    """Return the path on a disk, or if it does not exist, the nearest of its parents that does."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def bucket_reason(error: BaseException) -> str | None:
    """Return one line that says why a request to a bucket failed; None for any other error."""
    text = one_line(error)[:200]
    is_request = isinstance(error, OSError) and error.errno is None  # gcsfs sets no errno, the system does
    if type(error).__module__.partition(".")[0] not in REMOTE and not is_request:
        return None
    code = getattr(error, "code", None)
    if (isinstance(error, OSError) and text.startswith("Forbidden")) or code in (401, 403) or "auth" in type(error).__module__:
        return (
            f"access is denied ({text}); log in with `gcloud auth application-default login`, "
            "or give the machine's service account the role Storage Object User"
        )
    if isinstance(error, FileNotFoundError):
        return f"no such bucket or object ({text}); make the bucket with `gcloud storage buckets create`, or check its name"
    return f"cannot be reached ({text})"


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an error of a disk or a bucket into a `UserError` that names the file."""
    try:
        yield
    except Exception as error:
        reason = bucket_reason(error) if is_bucket(path) else None
        if reason is None and isinstance(error, OSError):
            reason = f"{error.strerror or error}; free space or choose another path"
        if reason is None:
            raise
        raise UserError(f"cannot write {path}: {reason}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when the block ends: readers never see half of it, even after a crash.

    Raises:
      UserError: it cannot be written.
    """
    with write_errors(path):
        scratch = _new_scratch(path)
        try:
            with scratch.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if is_bucket(path):
                bucket_file_system().put_file(str(scratch), os.fspath(path))
            else:
                scratch.replace(path)
                sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):  # the error of the write matters more
                scratch.unlink(missing_ok=True)


def is_unfinished(path: Path) -> bool:
    """Return whether a file is the unfinished one of a killed writer."""
    return path.name.startswith(".") and path.name.endswith(PART)


def _new_scratch(path: Path) -> Path:
    """Return the path where a file is written before it replaces `path`; make its folder."""
    if is_bucket(path):
        descriptor, name = tempfile.mkstemp()
        os.close(descriptor)
        return Path(name)
    if not path.name or (path.exists() and not path.is_file()):  # a device would be deleted
        raise UserError(f"cannot write {path}: it is a folder or a device; expected a file, or an unused path")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}{PART}")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file; a failure keeps the older one.

    Raises:
      UserError: it cannot be written.
    """
    if is_bucket(path):
        with write_errors(path):
            bucket_file_system().pipe_file(os.fspath(path), content)
        return
    with replacing(path) as file:
        file.write(content)


def write_json(path: Path, content: dict | list, sort_keys: bool = False) -> None:
    """Write a JSON file, as `write_bytes` does.

    Raises:
      UserError: it cannot be written.
      ValueError: a number is NaN or infinite.
    """
    write_bytes(path, to_json(content, sort_keys))


def to_json(content: dict | list, sort_keys: bool = False) -> bytes:
    """Return JSON as it is stored: indented, with a line feed at its end.

    Raises:
      ValueError: a number is NaN or infinite.
    """
    text = json.dumps(content, indent=2, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode(errors="backslashreplace")  # a lone surrogate, as in a file's name, becomes JSON's \udc80


def read_json(path: Path) -> dict:
    """Return the content of a JSON file that holds an object.

    Raises:
      UserError: it is missing or unreadable, or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = bucket_reason(error) if is_bucket(path) else None
        raise UserError(f"{path} cannot be read ({reason or error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object of keys and values")
    return content


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the user's cache folder of the project."""
    folder = Path(environment.get("XDG_CACHE_HOME") or "")
    folder = folder if folder.is_absolute() else Path.home() / ".cache"  # neither in a bucket nor in the working directory
    return folder / "metaembed_jax"


def digest(content: bytes) -> str:
    """Return 16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def sync_folder(folder: Path) -> None:
    """Wait until renames and new files in a folder are on the disk, so that they survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(path: Path) -> None:
    """Remove a folder and its content, if it exists."""
    if is_bucket(path):
        path.rmtree(missing_ok=True)  # pyright: ignore[reportAttributeAccessIssue]  a method of epath.Path
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a folder on a disk that replaces `path` when the block ends: it is renamed, or uploaded.

    Raises:
      UserError: it cannot be written.
    """
    with write_errors(path):
        if is_bucket(path):
            with tempfile.TemporaryDirectory() as scratch:
                yield Path(scratch)
                remove_folder(path)
                upload(Path(scratch), path)
            return
        scratch = path.with_name(f".{path.name}.{os.getpid()}{PART}")
        remove_folder(scratch)  # of a killed process with the same id, as all have in containers
        scratch.mkdir(parents=True)
        try:
            yield scratch
            remove_folder(path)
            scratch.replace(path)
            sync_folder(path.parent)
        finally:
            remove_folder(scratch)


def upload(folder: Path, target: Path) -> None:
    """Copy the files of a folder on a disk into a bucket, `LAST` after all others.

    Raises:
      UserError: a file cannot be written.
    """
    paths = [path for path in folder.rglob("*") if path.is_file()]
    for path in sorted(paths, key=lambda path: (path.name in LAST, -LAST.index(path.name) if path.name in LAST else 0, path)):
        target_path = target / path.relative_to(folder).as_posix()
        with write_errors(target_path):
            bucket_file_system().put_file(str(path), os.fspath(target_path))


class Uploads:
    """A folder for libraries that write only to disks: the path itself, or a temporary folder that `send` copies into a bucket.

    Attributes:
      folder: where to write.
    """

    def __init__(self, path: Path):
        self._path, self._scratch = path, tempfile.TemporaryDirectory() if is_bucket(path) else None
        self.folder = Path(self._scratch.name) if self._scratch else path

    def send(self) -> None:
        """Copy all files into the bucket; do nothing on a disk.

        Raises:
          UserError: it cannot be written.
        """
        if self._scratch:
            upload(self.folder, self._path)

    def close(self) -> None:
        """Send the files, and remove the temporary folder."""
        if self._scratch:
            self.send()
            self._scratch.cleanup()


@contextlib.contextmanager
def locked(file: Path, busy: str, wait: bool = False) -> Iterator[None]:
    """Hold a lock on a disk, which ends with the process at the latest. The file stays.

    Args:
      busy: the message if another process holds it.
      wait: print the message and wait, instead of raising an error.

    Raises:
      UserError: another process holds it, or the file cannot be made.
    """
    try:
        lock = open(file, "a", opener=_open)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                if not wait:
                    raise UserError(busy) from None
                print(busy, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _open(path: str, flags: int) -> int:
    """Open a file without following a link out of the folder, or waiting for the reader of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
