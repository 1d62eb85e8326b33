"""The folder of an index: who may write it, and how it changes all at once.

    INDEX/manifest.json    what the index is
    INDEX/draft.json       what a command has written of a new one so far, that can go on
    INDEX/lock             held by the process that writes
    INDEX/{16 hex digits}  segments

A change writes new segments, then the manifest, which is renamed into its place: a reader, and whoever comes after a crash,
finds the old index or the new one. Segments are removed when no manifest names them; who has them open keeps them.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from metaembed_jax.errors import UserError
from metaembed_jax.files import PART, locked, sync_folder, write_bytes
from metaembed_jax.retrieval.manifest import NAME, Manifest, decode, encode
from metaembed_jax.retrieval.segment import SegmentFiles

MANIFEST, DRAFT, LOCK = "manifest.json", "draft.json", "lock"
TRIES = 5  # of opening an index that is replaced again and again


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an index.

    Raises:
      UserError: there is no index, or it is damaged.
    """
    try:
        return decode(folder / MANIFEST)
    except FileNotFoundError:
        raise UserError(f"{folder} is no index: it has no {MANIFEST}") from None


def open_index(folder: Path) -> tuple[Manifest, list[SegmentFiles]]:
    """The manifest and the segments that it names.

    Raises:
      UserError: there is no index, or it is damaged.
    """
    manifest = read_manifest(folder)
    for _ in range(TRIES):
        try:
            return manifest, [SegmentFiles(folder, manifest, one) for one in manifest.segments]
        except FileNotFoundError as error:
            before, manifest = manifest, read_manifest(folder)
            if manifest == before:  # it was not replaced while it was being opened
                raise UserError(f"{error.filename} is missing, which {folder / MANIFEST} names; build the index again") from None
    raise UserError(f"{folder} is being replaced too often to be read; try again")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """Makes the folder, if need be, and holds its lock, which ends with the process at the latest.

    Raises:
      UserError: another process writes the index, or the folder holds something else.
    """
    try:
        if folder.exists() and not is_index(folder) and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and is no index: choose another place")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be an index ({error.strerror}); choose another place") from error
    with locked(folder / LOCK, f"{folder} is being written by another process; wait for it to end"):
        yield folder


@contextlib.contextmanager
def changing(folder: Path) -> Iterator[Path]:
    """`writing`, where all that was written and not committed, before or now, is removed.

    Raises:
      UserError: as `writing`, or the index that is there is damaged.
    """
    with writing(folder):
        clean(folder, *manifests_in(folder))
        try:
            yield folder
        finally:
            clean(folder, *manifests_in(folder))


def is_index(folder: Path) -> bool:
    """Whether a folder holds an index, or what became of one that was never finished."""
    if any((folder / name).is_file() for name in (MANIFEST, DRAFT)):
        return True
    # Others have files that are called "lock", too.
    ours = (path.name == LOCK or _is_segment(path) or _is_part(path) for path in folder.iterdir())
    return (folder / LOCK).is_file() and all(ours)


def read_draft(folder: Path, job: str) -> Manifest | None:
    """What was written of a job so far; None if nothing was, or it cannot be used.

    Its segments are there and whole; the caller holds the lock.
    """
    try:
        draft = decode(folder / DRAFT)
        for one in draft.segments if draft.job == job else ():
            SegmentFiles(folder, draft, one).check_all()  # it could not go on again and again
        return draft if draft.job == job else None
    except (UserError, FileNotFoundError):
        return None


def write_draft(folder: Path, manifest: Manifest) -> None:
    """Remembers what is written of a job so far; the caller holds the lock."""
    _replace(folder / DRAFT, manifest)


def commit(folder: Path, manifest: Manifest) -> None:
    """Makes this the index, and removes what no longer belongs to one; the caller holds the lock."""
    _replace(folder / MANIFEST, manifest)
    (folder / DRAFT).unlink(missing_ok=True)
    clean(folder, manifest)


def clean(folder: Path, *manifests: Manifest | None) -> None:
    """Removes segments that none of the manifests names, and files that were never finished; nothing else."""
    named = {one.name for manifest in manifests if manifest for one in manifest.segments}
    for path in folder.iterdir():
        if _is_segment(path) and path.name not in named:
            shutil.rmtree(path)
        elif _is_part(path):
            path.unlink()


def manifests_in(folder: Path) -> list[Manifest]:
    """Those of the index, and of the one that is being written, if they are there.

    Raises:
      UserError: the index is damaged.
    """
    found = []
    with contextlib.suppress(FileNotFoundError):
        found.append(decode(folder / MANIFEST))
    with contextlib.suppress(FileNotFoundError, UserError):  # a draft is only worth the time it saves
        found.append(decode(folder / DRAFT))
    return found


def _is_segment(path: Path) -> bool:
    return bool(NAME.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()


def _is_part(path: Path) -> bool:
    return path.name.startswith((f".{MANIFEST}.", f".{DRAFT}.")) and path.name.endswith(PART) and path.is_file()


def _replace(path: Path, manifest: Manifest) -> None:
    sync_folder(path.parent)  # the segments' folders are there before what names them
    write_bytes(path, encode(manifest))
