"""Base weights: a released vision-language model that a run starts from, in a directory or on the Hugging Face hub.

The checkpoints of a run hold trained parameters only. Frozen parameters are read from the base weights, which `run.json` records by
name and fingerprint.
"""

import contextlib
import hashlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download
from safetensors import safe_open
from tqdm import tqdm

from metaembed_jax import files
from metaembed_jax.checkpoints.huggingface import list_tensors
from metaembed_jax.errors import UserError

ROWS, COLUMNS = 64, 256  # of each tensor, at most, that the fingerprint reads
WRITER_KEYS = ("transformers_version", "_name_or_path")  # of config.json, about the program that wrote it


class BaseRecord(NamedTuple):
    """Base weights as run.json records them.

    Attributes:
      name: the absolute path or hub id, for `open_base`.
      fingerprint: digest of the weights.
    """

    name: str
    fingerprint: str


class BaseWeights(NamedTuple):
    """A directory with weights.

    Attributes:
      name, fingerprint: as in `BaseRecord`.
      directory: the folder of the files.
    """

    name: str
    directory: Path
    fingerprint: str


def find(name: str | Path) -> Path:
    """Return the directory of a path or a hub id. A model of the hub is downloaded once, and is in its cache after that.

    Raises:
      UserError: no such directory and no such model on the hub, or it is neither a run nor a Hugging Face model.
    """
    files.check_scheme(os.fspath(name))
    if files.is_bucket(name):
        return _find_in_bucket(files.any_path(name))
    try:
        directory = Path(name).expanduser()
        if not directory.exists():
            directory = Path(snapshot_download(str(name), allow_patterns=["*.safetensors", "*.json"], ignore_patterns=["*/*"]))
    except Exception as error:  # paths raise errors of the system, and the hub's client those of any library below it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = "" if Path(name).is_absolute() else f" ({Path(name).absolute()} does not exist)"
        raise UserError(f"{name}: no such directory{where}, and no such model on the hub ({reason})") from error
    return _check_kind(directory)


def _check_kind(directory: Path) -> Path:
    if not (directory / "run.json").exists() and not (directory / "config.json").exists():
        raise UserError(f"{directory} is neither a run (it has no run.json) nor a Hugging Face model (it has no config.json)")
    return directory


def _find_in_bucket(directory: Path) -> Path:
    """Return the directory of a run, or a copy on a disk of a Hugging Face directory, since safetensors reads disks only.

    Raises:
      UserError: as `find`, or the disk is full.
    """
    files.check_bucket(directory)
    if (_check_kind(directory) / "run.json").exists():
        return directory
    system = files.bucket_file_system()
    stored = [entry for entry in system.ls(os.fspath(directory), detail=True) if entry["name"].endswith((".safetensors", ".json"))]
    version = [(entry["name"], entry["size"], entry["generation"]) for entry in stored]
    folder = files.cache_folder() / "models" / files.digest(repr(sorted(version)).encode())
    if folder.exists():
        return folder
    with files.write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            copy = Path(scratch) / "model"
            copy.mkdir()
            for entry in tqdm(stored, f"copying {directory}", unit="file", delay=2):
                system.get_file(entry["name"], str(copy / entry["name"].rpartition("/")[2]))
            with contextlib.suppress(OSError):  # another process was first
                copy.replace(folder)
    return folder


def open_base(name: str) -> BaseWeights:
    """Return the base weights of a path or hub id.

    Raises:
      UserError: it cannot be found, or has no config.json.
    """
    directory = find(name)
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} is not a Hugging Face model: it has no config.json")
    is_path = not files.is_bucket(name) and Path(name).expanduser().exists()
    return BaseWeights(str(directory.absolute()) if is_path else str(name), directory, fingerprint(directory))


def open_recorded(workdir: Path, record: BaseRecord) -> BaseWeights:
    """Return the base weights that a run records.

    Raises:
      UserError: they are missing, or are other weights now.
    """
    try:
        base = open_base(record.name)
    except UserError as error:
        raise UserError(f"{workdir}: its base is missing ({error}); move it back, or write its new path into run.json") from error
    if base.fingerprint != record.fingerprint:
        raise UserError(
            f"{workdir} was trained on weights of fingerprint {record.fingerprint}, and {base.directory} has "
            f"{base.fingerprint}: it is another model"
        )
    return base


def fingerprint(directory: Path) -> str:
    """Return 16 hexadecimal digits of config.json and of all tensors: their names, types, shapes, and a sample of their numbers.

    The names and the order of files do not count. Reading all of a large checkpoint would take minutes, so the sample has about
    `ROWS` rows of each tensor and `COLUMNS` numbers of each row. Further training changes it; a change of a single number may not.
    """
    stored = {key: value for key, value in files.read_json(directory / "config.json").items() if key not in WRITER_KEYS}
    digests = [digest for file in directory.glob("*.safetensors") for digest in _digests(file)]
    return files.digest("".join([json.dumps(stored, sort_keys=True), *sorted(digests)]).encode())


def _digests(file: Path) -> list[str]:
    digests, tensors = [], list_tensors(file)
    with safe_open(file, "np") as handle:
        for key, _, shape, dtype in tensors:
            digest = hashlib.sha256(f"{key} {dtype} {shape}".encode())
            if not shape:
                digest.update(handle.get_tensor(key).tobytes())
            for row in range(0, shape[0], math.ceil(shape[0] / ROWS)) if shape else ():
                sample = (slice(row, row + 1), *(slice(0, min(COLUMNS, size)) for size in shape[1:]))
                digest.update(handle.get_slice(key)[sample].tobytes())
            digests.append(digest.hexdigest())
    return digests
