"""Reads the weights of a Hugging Face directory, strictly, tensor by tensor, into the shards of each parameter.

Every tensor of the files becomes a parameter or is on its family's list of unused ones; every parameter is filled; every
shape is checked, all before the first number is read. Only safetensors: other formats can run code when they are opened.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from metaembed_jax.backbones.conversion import Source
from metaembed_jax.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")


class Stored(NamedTuple):
    """A tensor of an open file; `key` is its name there."""

    key: str
    file: Path
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def read_backbone(directory: Path, family: ModuleType, abstract: dict) -> dict:
    """The parameters of a backbone.

    Args:
      directory: with `model.safetensors.index.json` and the files that it names, or with *.safetensors alone.
      family: module of the family, with `KEYS`, `UNUSED_KEYS` and `canonical_key`.
      abstract: the parameters as nested dicts of shapes, with the dtype and sharding that each is to have.

    Raises:
      UserError: a tensor is missing, left over, there twice, or of another shape or type; names key, file and shapes.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    parameters = {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}
    with contextlib.ExitStack() as stack:
        stored = _open_tensors(directory, family.canonical_key, stack)
        used = set(family.UNUSED_KEYS)
        for path, parameter in parameters.items():
            used |= _check(directory, stored, path, parameter, family.KEYS[path])
        for key, tensor in stored.items():
            if key not in used:
                name = f"{tensor.file}: {tensor.key} of shape {tensor.shape}"
                raise UserError(f"{name} is no tensor of this model; is config.json of this checkpoint?")
        return structure.unflatten(_read(stored, parameter, family.KEYS[path]) for path, parameter in parameters.items())


def read_json(path: Path) -> dict:
    """The content of a JSON file that holds an object.

    Raises:
      UserError: names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not an object of keys and values")
    return content


def _names(source: Source, shape: tuple[int, ...]) -> tuple[list[str], tuple[int, ...]]:
    """The tensors that fill a parameter (one for each layer of a stack), and the shape that each must have."""
    if "{}" not in source.key:
        return [source.key], source.shape(shape)
    return [source.key.format(layer) for layer in range(shape[0])], source.shape(shape[1:])


def _check(directory: Path, stored: dict[str, Stored], path: str, parameter: jax.ShapeDtypeStruct, source: Source) -> set[str]:
    names, shape = _names(source, parameter.shape)
    for name in names:
        if name not in stored:
            needed = f"the model needs it for {path} {parameter.shape}"
            raise UserError(f"{directory}: {name} of shape {shape} is in none of its safetensors files; {needed}")
        tensor = stored[name]
        if tensor.shape != shape:
            raise UserError(f"{tensor.file}: {tensor.key} has shape {tensor.shape}, and config.json asks for {shape}")
    return set(names)


def _read(stored: dict[str, Stored], parameter: jax.ShapeDtypeStruct, source: Source) -> jax.Array:
    names, _ = _names(source, parameter.shape)
    values = np.empty(parameter.shape, parameter.dtype)
    layers = values if "{}" in source.key else values[None]
    for layer, name in zip(layers, names, strict=True):
        layer[...] = source.read(stored[name].read())
    return jax.device_put(values, parameter.sharding)


def _open_tensors(directory: Path, canonical_key: Callable[[str], str], stack: contextlib.ExitStack) -> dict[str, Stored]:
    files, index = _files(directory)
    stored: dict[str, Stored] = {}
    for file in files:
        for tensor in _open(file, stack):
            if index is not None and index.pop(tensor.key, None) != file.name:
                raise UserError(
                    f"{file}: {tensor.key} of shape {tensor.shape} is not there by {INDEX}; download the directory again"
                )
            other = stored.setdefault(canonical_key(tensor.key), tensor)
            if other is not tensor:
                shapes = f"shapes {other.shape} and {tensor.shape}"
                raise UserError(
                    f"{tensor.file}: {tensor.key} is there twice, {shapes}: also as {other.key} in {other.file}; remove one"
                )
    for key, name in (index or {}).items():
        raise UserError(f"{directory / name}: lacks {key}, which {INDEX} says is there; download the directory again")
    return stored


def _files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files to read, and the index where there is one: from tensor to the name of its file."""
    found = sorted(directory.glob("*.safetensors"))
    if (directory / INDEX).is_file():
        if (directory / SINGLE).is_file():
            raise UserError(f"{directory}: has both {SINGLE} and {INDEX}; remove one")
        index = read_json(directory / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise UserError(f"{directory / INDEX}: its weight_map does not map tensors to files; download it again")
        for key, name in index.items():
            # A name and nothing more, whatever the separators of the system are, so that no path leads out of the directory.
            if not name.endswith(".safetensors") or any(mark in name for mark in "/\\:\0"):
                raise UserError(
                    f"{directory / INDEX}: {key} is said to be in {name!r}, which is no safetensors file of this directory"
                )
        return [directory / name for name in sorted(set(index.values()))], dict(index)
    if not found:
        pickled = sorted(path.name for ending in ("*.bin", "*.pt", "*.pth") for path in directory.glob(ending))
        reason = (
            f"{pickled[0]} is a pickle, which can run code; convert it to safetensors" if pickled else "there are no *.safetensors"
        )
        raise UserError(f"{directory}: {reason}")
    return found, None


def _open(file: Path, stack: contextlib.ExitStack) -> list[Stored]:
    try:
        handle = stack.enter_context(safe_open(file, "np"))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({error}); download it again") from error
    tensors = []
    for key in handle.keys():  # noqa: SIM118 (not a dict)
        header = handle.get_slice(key)
        if header.get_dtype() not in FLOATS:
            raise UserError(f"{file}: {key} is {header.get_dtype()}; only {', '.join(FLOATS)} are read, not quantised weights")
        tensors.append(Stored(key, file, tuple(header.get_shape()), lambda key=key: handle.get_tensor(key)))
    return tensors
