"""What a run starts from: the weights of a vision-language model as Hugging Face ships them, in a directory or on the hub.

A run's checkpoints hold what trained. Where something did not, `run.json` says of what base, by name and fingerprint, and the rest
is read from there again.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download
from safetensors import safe_open

from metaembed_jax.checkpoints.huggingface import list_tensors, read_json
from metaembed_jax.errors import UserError

SAMPLE = 256  # numbers of each tensor that the fingerprint reads


class Base(NamedTuple):
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
    try:
        directory = Path(name).expanduser()
        if directory.exists():
            return directory
        return Path(snapshot_download(str(name), allow_patterns=["*.safetensors", "*.json"], ignore_patterns=["*/*"]))
    except Exception as error:  # of a path the system has its own, and of the net every library below the hub's client
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: there is no such directory, and the hub gives no model of this id ({reason})") from error


def open_base(name: str) -> Base:
    """The base of a path or hub id.

    Raises:
      UserError: it cannot be found, or has no config.json.
    """
    directory = find(name)
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory}: is no Hugging Face model, it has no config.json")
    stands = Path(name).expanduser().exists()
    return Base(str(directory.absolute()) if stands else str(name), directory, fingerprint(directory))


def open_recorded(workdir: Path, record: dict) -> Base:
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
    """16 hex digits from config.json and from the names, types, shapes and first numbers of all tensors.

    All of a large checkpoint would take minutes to read; weights that were trained further differ in their first numbers too.
    """
    digest = hashlib.sha256(json.dumps(read_json(directory / "config.json"), sort_keys=True).encode())
    for file in sorted(directory.glob("*.safetensors")):
        tensors = sorted(list_tensors(file))
        with safe_open(file, "np") as handle:
            for key, _, shape, dtype in tensors:
                row = (*(slice(0, 1) for _ in shape[1:]), *(slice(0, min(SAMPLE, size)) for size in shape[-1:]))
                first = handle.get_slice(key)[row] if shape else handle.get_tensor(key)
                digest.update(f"{key} {dtype} {list(shape)}".encode() + first.tobytes())
    return digest.hexdigest()[:16]
