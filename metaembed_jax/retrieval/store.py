"""The folder of an index: its lock, and changes that are atomic.

    INDEX/manifest.json    the index
    INDEX/draft.json       the segments that an unfinished job has written
    INDEX/lock             locked by the process that writes
    INDEX/{16 hex digits}  segments

A change writes new segments, and then replaces the manifest: a reader sees the old index or the new one, also after a crash.
Segments that no manifest names are removed; a reader that has opened them can still read them.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from metaembed_jax import hosts
from metaembed_jax.errors import UserError
from metaembed_jax.files import PART, locked, sync_folder, write_bytes
from metaembed_jax.retrieval.checksummed_files import open_regular
from metaembed_jax.retrieval.manifest import NAME, Manifest, Segment, decode, encode
from metaembed_jax.retrieval.segment import SegmentFiles

MANIFEST, DRAFT, LOCK = "manifest.json", "draft.json", "lock"
START = b'{"sha256"'  # of a manifest
SHARED_SECONDS = 30  # until a host sees a file that another has written, on a network's file system
OPENING_SECONDS = 30  # until an index is open that another process replaces meanwhile


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an index.

    Raises:
      UserError: the folder is not an index, or the manifest is damaged.
    """
    try:
        return decode(folder / MANIFEST)
    except FileNotFoundError:
        raise UserError(f"{folder} is not an index: it has no {MANIFEST}") from None


def read_manifests(folder: Path) -> tuple[Manifest | None, Manifest | None]:
    """Read the manifest and the draft of an index; None for one that does not exist, and for a damaged draft.

    Raises:
      UserError: the manifest is damaged.
    """
    manifest = draft = None
    with contextlib.suppress(FileNotFoundError):
        manifest = decode(folder / MANIFEST)
    with contextlib.suppress(FileNotFoundError, UserError):  # a job with a damaged draft starts again
        draft = decode(folder / DRAFT)
    return manifest, draft


def open_index(folder: Path) -> tuple[Manifest, list[SegmentFiles]]:
    """Open the manifest of an index and the segments that it names.

    Raises:
      UserError: the folder is not an index, or the index is damaged.
    """
    manifest = read_manifest(folder)
    deadline = time.monotonic() + OPENING_SECONDS
    while time.monotonic() < deadline:
        try:
            return manifest, [SegmentFiles(folder, manifest, segment) for segment in manifest.segments]
        except FileNotFoundError as error:
            previous, manifest = manifest, read_manifest(folder)
            if manifest == previous:  # no process has replaced the index meanwhile
                raise UserError(f"{error.filename} is missing, which {folder / MANIFEST} names; build the index again") from None
    raise UserError(f"{folder} was replaced again and again for {OPENING_SECONDS} s while it was being opened; try again")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """Create a folder if it does not exist, and hold its lock. The end of the process releases the lock.

    Raises:
      UserError: another process is writing the index, or the folder holds something else.
    """
    try:
        if folder.exists() and not is_index(folder) and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not an index; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another folder") from error
    with locked(folder / LOCK, f"{folder} is being written by another process; wait for it to end"):
        yield folder


@contextlib.contextmanager
def changing(folder: Path) -> Iterator[Path]:
    """Hold the lock of a folder as `writing`, and remove uncommitted segments before and after the change.

    Raises:
      UserError: as `writing`, or the index in the folder is damaged.
    """
    with writing(folder):
        clean(folder, *read_manifests(folder))
        try:
            yield folder
        finally:
            clean(folder, *read_manifests(folder))


def check_shared(folder: Path) -> None:
    """Check that all hosts see the folder of the first, which writes a file there and removes it.

    Raises:
      UserError: the folder is not shared; names a host.
    """
    if hosts.count_hosts() == 1:
        return
    file = folder / f".{DRAFT}.{hosts.from_first(os.urandom(8).hex())}{PART}"  # `store.clean` removes it after a crash
    if hosts.is_first():
        file.touch()
    hosts.wait_for_all("shared")
    deadline = time.monotonic() + SHARED_SECONDS
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = hosts.gather_texts("seen" if file.exists() else "")
    if hosts.is_first():
        file.unlink()
    if "" in seen:
        host = seen.index("")
        raise UserError(f"{folder}: host {host} does not see the files of the first host; expected a folder that all hosts share")


def is_index(folder: Path) -> bool:
    """Return whether a folder holds an index, or an unfinished one."""
    has_lock = (folder / LOCK).is_file()
    if any(_is_manifest(folder / name, has_lock) for name in (MANIFEST, DRAFT)):
        return True
    # Other programs also have files called "lock".
    is_ours = (path.name == LOCK or _is_segment(path) or _is_unfinished(path) for path in folder.iterdir())
    return has_lock and all(is_ours)


def _is_manifest(path: Path, has_lock: bool) -> bool:
    """Return whether a file begins as a manifest does: other programs also have a manifest.json. Next to a lock it may be empty."""
    try:
        with open_regular(path) as file:
            start = b"".join(file.read(32).split())
    except (OSError, UserError):
        return False
    return start.startswith(START) or (has_lock and START.startswith(start))


def write_draft(folder: Path, manifest: Manifest) -> None:
    """Record the segments that a job has written. The caller holds the lock."""
    _replace(folder / DRAFT, manifest)


def commit(folder: Path, manifest: Manifest) -> bool:
    """Replace the manifest of the index, and remove the draft and segments that it does not name. The caller holds the lock.

    Returns:
      False if the manifest is the same as before, which is not written again.
    """
    is_changed = not (folder / MANIFEST).exists() or read_manifest(folder) != manifest
    if is_changed:
        _replace(folder / MANIFEST, manifest)
    (folder / DRAFT).unlink(missing_ok=True)
    clean(folder, manifest)
    return is_changed


def clean(folder: Path, *manifests: Manifest | None) -> None:
    """Remove segments that no manifest names, and unfinished files."""
    named = {segment.name for manifest in manifests if manifest for segment in manifest.segments}
    for path in folder.iterdir():
        if _is_segment(path) and path.name not in named:
            shutil.rmtree(path)
        elif _is_unfinished(path):
            path.unlink()


def remove(folder: Path, segments: Iterable[Segment]) -> None:
    """Remove segments that no manifest names."""
    for segment in segments:
        shutil.rmtree(folder / segment.name)


def _is_segment(path: Path) -> bool:
    return bool(NAME.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()


def _is_unfinished(path: Path) -> bool:
    return path.name.startswith((f".{MANIFEST}.", f".{DRAFT}.")) and path.name.endswith(PART) and path.is_file()


def _replace(path: Path, manifest: Manifest) -> None:
    sync_folder(path.parent)  # the segments' folders must be on the disk before the manifest
    write_bytes(path, encode(manifest))
