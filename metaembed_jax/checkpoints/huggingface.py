"""Reads the weights of a Hugging Face directory, strictly, tensor by tensor, into the shards of each parameter.

Every tensor of the files becomes a parameter or is on its family's list of unused ones; every parameter is filled; every
shape is checked, all before the first number is read. Only safetensors: other formats can run code when they are opened.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from metaembed_jax.backbones.config import FamilyConfig
from metaembed_jax.backbones.family import Family
from metaembed_jax.backbones.layers import quantize
from metaembed_jax.backbones.weight_map import Source
from metaembed_jax.errors import UserError
from metaembed_jax.files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEAD = "head.safetensors"  # of our own exports: "weight" [D, hidden]
METADATA = "metaembed"  # in the config.json of our own exports: numbers and place of the Meta Tokens, and more
SCALE = "_scale"  # what the name of an int8 kernel's scales adds to the kernel's
FLOATS = ("F64", "F32", "F16", "BF16")


class Stored(NamedTuple):
    """A tensor of a file; `key` is its name there."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> np.ndarray:
        """The tensor. The file is opened for it alone, so that its pages do not add up to the whole checkpoint in memory."""
        with safe_open(self.file, "np") as handle:
            return handle.get_tensor(self.key)


def read_backbone(directory: Path, family: Family, architecture: FamilyConfig, wanted: dict) -> dict:
    """Parameters of a backbone, read tensor by tensor: beside them, memory holds one tensor at a time.

    Args:
      directory: with `model.safetensors.index.json` and the files that it names, or with *.safetensors alone.
      family: of the architecture.
      architecture: the family's `Config`; all of its tensors must be there, whatever is wanted of them.
      wanted: nested dicts of shapes, each with the dtype and sharding that the parameter is to have. Beside an int8 kernel stands
        its `kernel_scale`.

    Raises:
      UserError: a tensor is missing, left over, there twice, or of another shape or type; names key, file and shapes.
    """
    backbone = nnx.eval_shape(lambda: family.Backbone(architecture, rngs=nnx.Rngs(0)))
    shapes = {path: leaf.shape for path, leaf in flatten_dict(nnx.to_pure_dict(nnx.state(backbone)), sep=".").items()}
    stored = _open_tensors(directory, family.canonical_key)
    used = set(family.unused_keys)
    for path, shape in shapes.items():
        used |= _check(directory, stored, path, shape, family.weight_map[path], architecture)
    for key, tensor in stored.items():
        if key not in used:
            name = f"{tensor.file}: {tensor.key} of shape {tensor.shape}"
            raise UserError(f"{name} is no tensor of this model; is config.json of this checkpoint?")
    wanted, parameters = flatten_dict(wanted, sep="."), {}

    def read(path: str, leaves: list[jax.ShapeDtypeStruct], turn: Callable) -> list[jax.Array]:
        return _read(stored, family.weight_map[path], architecture, leaves, turn)

    for path in tqdm(sorted(wanted), desc=f"reading {directory.name}", unit="parameter", delay=2):
        if path.endswith(SCALE):
            continue
        if wanted[path].dtype == jnp.int8:
            pair = (path, path + SCALE)
            parameters |= zip(pair, read(path, [wanted[name] for name in pair], quantize), strict=True)
        else:
            cast = wanted[path].dtype
            [parameters[path]] = read(path, [wanted[path]], lambda x, cast=cast: [x.astype(cast)])
    return unflatten_dict(parameters, sep=".")


def read_head(directory: Path, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """The kernel of the head [hidden, D] of one of our exports.

    Raises:
      UserError: it is missing, or of another shape.
    """
    stored = {tensor.key: tensor for tensor in list_tensors(directory / HEAD)}
    if set(stored) != {"weight"} or stored["weight"].shape != wanted.shape[::-1]:
        found = {key: tensor.shape for key, tensor in stored.items()}
        raise UserError(f"{directory / HEAD}: holds {found}, and config.json asks for weight of shape {wanted.shape[::-1]}")
    return _put(stored["weight"].read().T.astype(wanted.dtype), wanted.sharding)


def read_vocabulary_rows(directory: Path, family: Family, first: int, count: int) -> np.ndarray:
    """Rows of the embedding table [count, hidden], as they are stored.

    Raises:
      UserError: there are not as many.
    """
    tensor = _open_tensors(directory, family.canonical_key).get(family.embedding_key)
    rows = tensor.shape[0] if tensor and len(tensor.shape) == 2 else 0
    if first + count > rows:
        raise UserError(f"{directory}: has {rows} rows of {family.embedding_key}, and {first} to {first + count} are wanted")
    with safe_open(tensor.file, "np") as handle:
        return handle.get_slice(tensor.key)[first : first + count]


def _names(source: Source, architecture: FamilyConfig, shape: tuple[int, ...]) -> tuple[list[str], tuple[int, ...]]:
    """The tensors that fill a parameter (one for each layer of a stack), and the shape that each must have."""
    if "{}" not in source.key:
        return [source.key], source.shape(shape)
    return [source.name(architecture, layer) for layer in range(shape[0])], source.shape(shape[1:])


def _check(
    directory: Path, stored: dict[str, Stored], path: str, wanted: tuple[int, ...], source: Source, architecture: FamilyConfig
) -> set[str]:
    names, shape = _names(source, architecture, wanted)
    for name in names:
        if name not in stored:
            needed = f"the model needs it for {path} {wanted}"
            raise UserError(f"{directory}: {name} of shape {shape} is in none of its safetensors files; {needed}")
        tensor = stored[name]
        if tensor.shape != shape:
            raise UserError(f"{tensor.file}: {tensor.key} has shape {tensor.shape}, and config.json asks for {shape}")
    return set(names)


def _read(
    stored: dict[str, Stored], source: Source, architecture: FamilyConfig, wanted: list[jax.ShapeDtypeStruct], turn: Callable
) -> list[jax.Array]:
    """Fills parameters from one source; `turn` makes their values (of one layer) from the tensor as the family reads it."""
    names, _ = _names(source, architecture, wanted[0].shape)
    if "{}" not in source.key:
        values = turn(source.read(stored[names[0]].read()))
        return [_put(value, leaf.sharding) for value, leaf in zip(values, wanted, strict=True)]
    stacks = [jax.jit(functools.partial(jnp.zeros, leaf.shape, leaf.dtype), out_shardings=leaf.sharding)() for leaf in wanted]
    of_layer = [NamedSharding(leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[1:])) for leaf in wanted]
    for layer, name in enumerate(names):
        values = [_put(value, place) for value, place in zip(turn(source.read(stored[name].read())), of_layer, strict=True)]
        stacks = [_put_layer(stack, value, layer) for stack, value in zip(stacks, values, strict=True)]
    return stacks


def _put(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


@functools.partial(jax.jit, donate_argnums=0)
def _put_layer(stack: jax.Array, value: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)


def _open_tensors(directory: Path, canonical_key: Callable[[str], str]) -> dict[str, Stored]:
    files, index = _files(directory)
    stored: dict[str, Stored] = {}
    for file in files:
        for tensor in list_tensors(file):
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
    found = sorted(path for path in directory.glob("*.safetensors") if path.name != HEAD)
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


def list_tensors(file: Path) -> list[Stored]:
    """The tensors of a safetensors file, by their headers alone.

    Raises:
      UserError: it cannot be read, or holds what is no weight.
    """
    try:
        with safe_open(file, "np") as handle:
            headers = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)
            kinds = {key: (header.get_dtype(), tuple(header.get_shape())) for key, header in headers.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({error}); download it again") from error
    for key, (dtype, shape) in kinds.items():
        if dtype not in FLOATS:
            raise UserError(f"{file}: {key} is {dtype}; only {', '.join(FLOATS)} are read, not quantised weights")
        if 0 in shape:
            raise UserError(f"{file}: {key} has shape {shape}, which holds nothing; download it again")
    return [Stored(key, file, shape, dtype) for key, (dtype, shape) in kinds.items()]
