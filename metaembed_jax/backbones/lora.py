"""LoRA (arXiv 2106.09685): adapters of frozen linear maps, each a product of two narrow maps.

    y = x @ kernel + dropout(x) @ a @ b * alpha / rank

`b` starts at zero, so a fresh adapter changes nothing. Any `Linear` can have one, in a stack or not: shapes, axes and stacking
are those of its kernel.
"""

import dataclasses
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float, Int, UInt32

from metaembed_jax.backbones.layers import Linear, param, product
from metaembed_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The linear maps that have adapters, and the adapters' sizes.

    Attributes:
      kernels: patterns of the paths of kernels, as in `fnmatch`; `*` also matches dots.
      rank: width between `a` and `b`.
      alpha: the product is scaled by alpha / rank.
      dropout: the share of x that each adapter drops in training.
    """

    kernels: tuple[str, ...] = ()
    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.0


class Dropout(nnx.Variable):
    """The random key of an adapter's dropout, or the numbers of the batch's items, for each layer of a stack. Not a parameter."""


class Lora(nnx.Module):
    """The adapter of one linear map, or of a stack of them."""

    def __init__(self, linear: Linear, config: LoraConfig, *, rngs: nnx.Rngs):
        *stack, inputs, outputs = linear.kernel.shape
        layers = stack[0] if stack else None
        in_axis, out_axis = linear.kernel.get_metadata()["logical_axes"][-2:]
        gaussian = jax.nn.initializers.normal(1 / config.rank)  # as PEFT's init_lora_weights="gaussian"
        self.a = param(rngs, gaussian, (inputs, config.rank), (in_axis, None), layers)
        self.b = param(rngs, jax.nn.initializers.zeros, (config.rank, outputs), (None, out_axis), layers)
        self.scale, self.dropout = config.alpha / config.rank, config.dropout
        self.key = Dropout(jnp.zeros((*stack, 2), jnp.uint32)) if config.dropout else None
        self.items = Dropout(jnp.zeros((*stack, 1), jnp.int32)) if config.dropout else None

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        scale = self.scale
        if self.key is not None and self.items is not None:
            mask = dropout_mask(self.key[...], self.items[...], 1 - self.dropout, x.shape)
            x, scale = jnp.where(mask, x, 0), scale / (1 - self.dropout)
        return product(product(x, self.a[...].astype(x.dtype)) * scale, self.b[...].astype(x.dtype))


def dropout_mask(key: UInt32[Array, "2"], items_B: Int[Array, "B"], share: float, shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """Return a random mask that is true for about `share` of all elements: a hash of key, item, position in the item and column.

    An item has the same mask on any mesh and in any microbatch. `jax.random.bernoulli` would not do that, and its twenty rounds for
    each number are slow when every adapter of every layer draws a number for each of its inputs.

    Positions (all axes except the last) and columns are hashed by MurmurHash3's finaliser (Appleby, public domain), twice each; an
    element only mixes the two. Four layers of configs/3b.py's language model, 8 rows of 1360, compiled for v6e in 39 s this way, in
    58 s with each element hashed in full, and in 45 s without dropout, before items were part of the hash.

    Args:
      items_B: a number for each item of the batch.
      shape: shape of the mask. Its first axis is the batch, or the batch times the tiles of an item.
    """
    shape_in_item = (shape[0] // len(items_B), *shape[1:-1], 1)
    positions = jnp.uint32(0)
    for axis, size in enumerate(shape_in_item, 1):
        positions = positions * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, (1, *shape_in_item), axis)
    item_words = _hash(items_B.astype(jnp.uint32), key).reshape(-1, *[1] * len(shape_in_item))
    rows = _hash(positions, (key[0], item_words)).reshape(*shape[:-1], 1)
    columns = _hash(jnp.uint32(2**31) + jnp.arange(shape[-1], dtype=jnp.uint32), key)
    rows, columns = jax.lax.optimization_barrier((rows, columns))  # hashed once, not for every element
    mixed = rows ^ columns
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x2C1B3C6D)
    return mixed < jnp.uint32(min(round(share * 2**32), 2**32 - 1))


def _hash(number: UInt32[Array, "..."], words: Iterable[UInt32[Array, "..."]]) -> UInt32[Array, "..."]:
    for word in words:
        number = number ^ word
        number = (number ^ (number >> 16)) * jnp.uint32(0x85EBCA6B)
        number = (number ^ (number >> 13)) * jnp.uint32(0xC2B2AE35)
        number = number ^ (number >> 16)
    return number


def add_lora(network: nnx.Module, config: LoraConfig, *, rngs: nnx.Rngs) -> None:
    """Add an adapter to every `Linear` of a network whose kernel matches a pattern.

    Raises:
      UserError: a pattern matches no kernel.
    """
    linears = {
        ".".join((*map(str, path), "kernel")): module for path, module in nnx.iter_modules(network) if isinstance(module, Linear)
    }
    for pattern in config.kernels:
        if not any(fnmatchcase(path, pattern) for path in linears):
            raise UserError(f"the LoRA pattern {pattern!r} matches none of the kernels {', '.join(sorted(linears))}")
    for path in sorted(linears):
        if any(fnmatchcase(path, pattern) for pattern in config.kernels):
            linears[path].lora = nnx.data(Lora(linears[path], config, rngs=rngs))


def dropout_keys(abstract: dict, key: jax.Array) -> dict[tuple[str, ...], UInt32[Array, "..."]]:
    """Return a fresh key for each adapter, by its path in `abstract`: [2], or [L, 2] for a stack."""
    leaves: dict[tuple[str, ...], Any] = dict(flatten_dict(abstract))
    shapes = {path: leaf.shape for path, leaf in leaves.items() if path[-1] == "key"}
    keys = jax.random.split(key, max(len(shapes), 1))
    split = [jax.random.split(key, shape[0]) if len(shape) == 2 else key for shape, key in zip(shapes.values(), keys, strict=False)]
    return dict(zip(shapes, map(jax.random.key_data, split), strict=True))


def dropout_of(keys: dict[tuple[str, ...], UInt32[Array, "..."]], items_B: Int[Array, "B"]) -> dict:
    """Return the `Dropout` variables of a network as nested dicts: keys of `dropout_keys`, and the items of a batch."""
    items = {(*path[:-1], "items"): jnp.broadcast_to(items_B, (*key.shape[:-1], len(items_B))) for path, key in keys.items()}
    return unflatten_dict(keys | items)
