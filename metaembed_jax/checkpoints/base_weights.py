"""What a run starts from: the weights of a vision-language model as Hugging Face ships them, in a directory or on the hub.

A run's checkpoints hold what trained. Where something did not, `run.json` says of what base, by name and fingerprint, and the rest
is read from there again.
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

ROWS, COLUMNS = 64, 256  # of each tensor that the fingerprint reads at most
WRITERS_KEYS = ("transformers_version", "_name_or_path")  # of config.json, that say who wrote it


class BaseWeights(NamedTuple):
    """A directory with weights.

    Attributes:
      name: the absolute path or hub id that finds it again.
      directory: where its files are.
      fingerprint: of its weights.
    """

    name: str
    directory: Path
    fingerprint: str


def find(name: str | Path) -> Path:
    """The directory of a path or a hub id; what the hub has is downloaded once, and read from its cache when offline.

    Raises:
      UserError: there is no such directory, and the hub does not give one.
    """
    files.check_scheme(os.fspath(name))
    if files.is_bucket(name):
        return _find_in_bucket(files.any_path(name))
    try:
        directory = Path(name).expanduser()
        if directory.exists():
            return directory
        return Path(snapshot_download(str(name), allow_patterns=["*.safetensors", "*.json"], ignore_patterns=["*/*"]))
    except Exception as error:  # of a path the system has its own, and of the net every library below the hub's client
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: there is no such directory, and the hub gives no model of this id ({reason})") from error


def _find_in_bucket(directory: Path) -> Path:
    """A run stays where it is. The files of a Hugging Face directory are copied once: safetensors reads from disks alone.

    Raises:
      UserError: it is neither of the two, or there is no room for the copy.
    """
    files.check_bucket(directory)
    if (directory / "run.json").exists():
        return directory
    if not (directory / "config.json").exists():
        raise UserError(f"{directory}: is neither a run (it has no run.json) nor a Hugging Face model (it has no config.json)")
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
            with contextlib.suppress(OSError):  # another process was here first
                copy.replace(folder)
    return folder


def open_base(name: str) -> BaseWeights:
    """The base of a path or hub id.

    Raises:
      UserError: it cannot be found, or has no config.json.
    """
    directory = find(name)
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory}: is no Hugging Face model, it has no config.json")
    stands = not files.is_bucket(name) and Path(name).expanduser().exists()
    return BaseWeights(str(directory.absolute()) if stands else str(name), directory, fingerprint(directory))


def open_recorded(workdir: Path, record: dict) -> BaseWeights:
    """The base that a run records.

    Raises:
      UserError: it is no longer there, or holds other weights now.
    """
    try:
        base = open_base(record["name"])
    except UserError as error:
        raise UserError(f"{workdir}: its base is missing ({error}); put it back, or write its new place into run.json") from error
    if base.fingerprint != record["fingerprint"]:
        raise UserError(
            f"{workdir}: was trained on weights of fingerprint {record['fingerprint']}, and {base.directory} has "
            f"{base.fingerprint}: it is another model"
        )
    return base


def fingerprint(directory: Path) -> str:
    """16 hex digits of config.json and of all tensors: names, types, shapes, and numbers from all over each.

    Files and their order do not count. All of a large checkpoint would take minutes to read: about `ROWS` rows of a tensor
    are, with `COLUMNS` numbers of each. Weights that were trained further differ there; a single number elsewhere is not seen.
    """
    stored = {key: value for key, value in files.read_json(directory / "config.json").items() if key not in WRITERS_KEYS}
    parts = [digest for file in directory.glob("*.safetensors") for digest in _digests(file)]
    return files.digest("".join([json.dumps(stored, sort_keys=True), *sorted(parts)]).encode())


def _digests(file: Path) -> list[str]:
    """Of each tensor of a file."""
    found, tensors = [], list_tensors(file)
    with safe_open(file, "np") as handle:
        for key, _, shape, dtype in tensors:
            digest = hashlib.sha256(f"{key} {dtype} {shape}".encode())
            if not shape:
                digest.update(handle.get_tensor(key).tobytes())
            for row in range(0, shape[0], math.ceil(shape[0] / ROWS)) if shape else ():
                some = (slice(row, row + 1), *(slice(0, min(COLUMNS, size)) for size in shape[1:]))
                digest.update(handle.get_slice(key)[some].tobytes())
            found.append(digest.hexdigest())
    return found
