"""Read the weights of a Hugging Face directory, tensor by tensor, into the shards of each parameter.

Before the first number is read, the tensors are checked: each is read for a parameter or is on the family's list of unused ones,
each parameter has its tensors, and all shapes fit. Only safetensors is read, since other formats can run code.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
HEAD = "head.safetensors"  # of this project's exports: "weight" [D, hidden]
METADATA = "metaembed"  # key in the config.json of this project's exports: numbers and ids of the Meta Tokens, and more
SCALE = "_scale"  # the suffix of the path of an int8 kernel's scales
FLOATS = ("F64", "F32", "F16", "BF16")


class StoredTensor(NamedTuple):
    """A tensor in a file, under the name `key`."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> np.ndarray:
        """Read the tensor. The file is opened for each tensor, since pages of an open file would stay in memory."""
        with safe_open(self.file, "np") as handle:
            return handle.get_tensor(self.key)


def read_backbone(directory: Path, family: Family, architecture: FamilyConfig, abstract: dict) -> dict:
    """Read the parameters of a backbone, holding one tensor at a time in memory.

    Args:
      directory: contains `model.safetensors.index.json` and the files that it names, or *.safetensors without an index.
      family: family of the architecture.
      architecture: the family's `Config`; the directory must contain all of its tensors.
      abstract: the parameters to read, as nested dicts of shapes, with dtypes and shardings. An int8 kernel is next to its
        `kernel_scale`.

    Raises:
      UserError: a tensor is missing, unknown, stored twice, or of another shape or type; names key, file and shapes.
    """
    backbone = nnx.eval_shape(lambda: family.Backbone(architecture, rngs=nnx.Rngs(0)))
    parameters: dict[str, Any] = flatten_dict(nnx.to_pure_dict(nnx.state(backbone)), sep=".")
    stored = _open_tensors(directory, family)
    used = set(family.unused_keys)
    for path, leaf in parameters.items():
        used |= _check(directory, stored, path, leaf.shape, family.weight_map[path], architecture)
    for key, tensor in stored.items():
        if key not in used:
            name = f"{tensor.file}: {tensor.key} of shape {tensor.shape}"
            raise UserError(f"{name} is not a tensor of this model; is config.json of this checkpoint?")
    leaves: dict[str, Any] = flatten_dict(abstract, sep=".")
    arrays = {}

    def read(paths: Sequence[str], convert: Callable) -> None:
        values = _read(stored, family.weight_map[paths[0]], architecture, [leaves[path] for path in paths], convert)
        arrays.update(zip(paths, values, strict=True))

    for path in tqdm(sorted(leaves), desc=f"reading {directory.name}", unit="parameter", delay=2):
        if path.endswith(SCALE):
            continue
        dtype = leaves[path].dtype
        if dtype == jnp.int8:
            read((path, path + SCALE), quantize)
        else:
            read((path,), lambda x, dtype=dtype: [x.astype(dtype)])
    return unflatten_dict(arrays, sep=".")


def read_head(directory: Path, abstract: jax.ShapeDtypeStruct) -> jax.Array:
    """Read the kernel [hidden, D] of the head of an export.

    Raises:
      UserError: it is missing, or has another shape.
    """
    stored = {tensor.key: tensor for tensor in list_tensors(directory / HEAD)}
    if set(stored) != {"weight"} or stored["weight"].shape != abstract.shape[::-1]:
        shapes = {key: tensor.shape for key, tensor in stored.items()}
        raise UserError(f"{directory / HEAD} has {shapes}, and config.json asks for weight of shape {abstract.shape[::-1]}")
    return _put(stored["weight"].read().T.astype(abstract.dtype), abstract.sharding)


def read_vocabulary_rows(directory: Path, family: Family, first: int, count: int) -> np.ndarray:
    """Read rows of the embedding table [count, hidden], in the stored dtype.

    Raises:
      UserError: the table has too few rows.
    """
    tensor = _open_tensors(directory, family).get(family.embedding_key)
    if tensor is None or len(tensor.shape) != 2 or tensor.shape[0] < first + count:
        shape = tensor and tensor.shape
        raise UserError(f"{directory}: {family.embedding_key} has shape {shape}: expected at least {first + count} rows")
    with safe_open(tensor.file, "np") as handle:
        return handle.get_slice(tensor.key)[first : first + count]


def _names(source: Source, architecture: FamilyConfig, shape: tuple[int, ...]) -> tuple[list[str], tuple[int, ...]]:
    """Return the tensors of a parameter, one for each layer of a stack, and the shape that each must have."""
    if "{}" not in source.key:
        return [source.key], source.shape(shape)
    return [source.name(architecture, layer) for layer in range(shape[0])], source.shape(shape[1:])


def _check(
    directory: Path,
    stored: Mapping[str, StoredTensor],
    path: str,
    parameter: tuple[int, ...],
    source: Source,
    architecture: FamilyConfig,
) -> set[str]:
    names, shape = _names(source, architecture, parameter)
    for name in names:
        if name not in stored:
            need = f"the model needs it for {path} {parameter}"
            raise UserError(f"{directory}: {name} of shape {shape} is in none of its safetensors files; {need}")
        tensor = stored[name]
        if tensor.shape != shape:
            raise UserError(f"{tensor.file}: {tensor.key} has shape {tensor.shape}, and config.json asks for {shape}")
    return set(names)


def _read(
    stored: Mapping[str, StoredTensor], source: Source, architecture: FamilyConfig, leaves: Sequence[Any], convert: Callable
) -> list[jax.Array]:
    """Fill parameters from one source.

    Args:
      leaves: the parameters as shapes.
      convert: (tensor of a layer, as `source` reads it) -> the value of each parameter.
    """
    names, _ = _names(source, architecture, leaves[0].shape)
    if "{}" not in source.key:
        values = convert(source.read(stored[names[0]].read()))
        return [_put(value, leaf.sharding) for value, leaf in zip(values, leaves, strict=True)]
    stacks = [jax.jit(functools.partial(jnp.zeros, leaf.shape, leaf.dtype), out_shardings=leaf.sharding)() for leaf in leaves]
    of_layer = [NamedSharding(leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[1:])) for leaf in leaves]
    for layer, name in enumerate(names):
        values = convert(source.read(stored[name].read()))
        layers = [_put(value, sharding) for value, sharding in zip(values, of_layer, strict=True)]
        stacks = [_put_layer(stack, value, layer) for stack, value in zip(stacks, layers, strict=True)]
    return stacks


def _put(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


@functools.partial(jax.jit, donate_argnums=0)
def _put_layer(stack: jax.Array, value: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)


def _open_tensors(directory: Path, family: Family) -> dict[str, StoredTensor]:
    """Return the tensors of all files, by canonical key.

    Of a checkpoint that stores its embedding table as its output layer only, which config.json ties, that tensor has both keys.
    """
    files, index = _files(directory)
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in list_tensors(file):
            if index is not None and index.pop(tensor.key, None) != file.name:
                raise UserError(
                    f"{file}: {INDEX} does not list {tensor.key} {tensor.shape} for this file; download the directory again"
                )
            other = stored.setdefault(family.canonical_key(tensor.key), tensor)
            if other is not tensor:
                shapes = f"shapes {other.shape} and {tensor.shape}"
                raise UserError(
                    f"{tensor.file}: {tensor.key} is stored twice, {shapes}: also as {other.key} in {other.file}; remove one"
                )
    for key, name in (index or {}).items():
        raise UserError(f"{directory / name} lacks {key}, which {INDEX} lists for it; download the directory again")
    output = next((stored[key] for key in family.unused_keys if key in stored), None)
    if output and family.embedding_key not in stored and family.Config.is_tied(read_json(directory / "config.json")):
        stored[family.embedding_key] = output
    return stored


def _files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Return the files to read, and the index, {tensor: name of its file}; None if there is no index."""
    if (directory / INDEX).is_file():
        if (directory / SINGLE).is_file():
            raise UserError(f"{directory} has both {SINGLE} and {INDEX}; remove one")
        index = read_json(directory / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise UserError(f"{directory / INDEX}: its weight_map does not map tensors to files; download it again")
        for key, name in index.items():
            # No separator of any system may be in a name, so that no path leads out of the directory.
            if not name.endswith(".safetensors") or any(mark in name for mark in "/\\:\0"):
                raise UserError(f"{directory / INDEX}: {key} is in {name!r}: expected a safetensors file of this directory")
        return [directory / name for name in sorted(set(index.values()))], dict(index)
    files = sorted(path for path in directory.glob("*.safetensors") if path.name != HEAD)
    if not files:
        pickled = sorted(path.name for ending in ("*.bin", "*.pt", "*.pth") for path in directory.glob(ending))
        reason = f"{pickled[0]} is a pickle, which can run code; convert it to safetensors" if pickled else "has no *.safetensors"
        raise UserError(f"{directory}: {reason}")
    return files, None


def list_tensors(file: Path) -> list[StoredTensor]:
    """Read the headers of a safetensors file.

    Raises:
      UserError: it cannot be read, or has tensors that are not float weights.
    """
    try:
        with safe_open(file, "np") as handle:
            headers = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)
            kinds = {key: (header.get_dtype(), tuple(header.get_shape())) for key, header in headers.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}); download it again") from error
    for key, (dtype, shape) in kinds.items():
        if dtype not in FLOATS:
            raise UserError(f"{file}: {key} is {dtype}; only {', '.join(FLOATS)} are read, not quantised weights")
        if 0 in shape:
            raise UserError(f"{file}: {key} has shape {shape}, which is empty; download it again")
    return [StoredTensor(key, file, shape, dtype) for key, (dtype, shape) in kinds.items()]
