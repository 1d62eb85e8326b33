"""Qwen3-VL (arXiv 2511.21631), dense, as transformers' `modeling_qwen3_vl.py` computes it from the same checkpoint.

B rows, S tokens, V positions that are read, P patches, U units (merged 2x2 patches), N DeepStack features, D width, H heads,
G key/value heads, K head width, X numbers in a patch.

DeepStack (arXiv 2406.04334): the states after some layers of the tower are merged too, each by a separate merger, and added to the
image tokens after the first layers of the language model:

    tower     0 .. 5 .. 11 .. 17 .. 23 -> merger -> the image tokens' embeddings
                   |     |     |
    language       0     1     2   3 ..
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from metaembed_jax.backbones.attention import attention
from metaembed_jax.backbones.flop_counts import AttentionCount, FlopCount
from metaembed_jax.backbones.layers import (
    MLP,
    GatedMLP,
    LayerNorm,
    Linear,
    RMSNorm,
    at,
    normalised,
    param,
    place_units,
    rotate,
    scan_and_keep,
    split_heads,
)
from metaembed_jax.backbones.qwen import network
from metaembed_jax.backbones.qwen.network import language_counts, patch_angles
from metaembed_jax.backbones.qwen3_vl.config import Config, TextConfig, VisionConfig
from metaembed_jax.batch.items import Size
from metaembed_jax.batch.rows import Batch
from metaembed_jax.sharding import constrain


class VisionBlock(nnx.Module):
    """Pre-norm attention over all patches of an image, and a feed-forward, all with biases."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, layers: int):
        width = config.hidden_size
        self.heads = config.num_heads
        self.norm1 = LayerNorm(width, epsilon=1e-6, rngs=rngs, layers=layers)
        self.norm2 = LayerNorm(width, epsilon=1e-6, rngs=rngs, layers=layers)
        self.query = Linear(width, width, axes=("embed", "heads"), bias=True, rngs=rngs, layers=layers)
        self.key = Linear(width, width, axes=("embed", "heads"), bias=True, rngs=rngs, layers=layers)
        self.value = Linear(width, width, axes=("embed", "heads"), bias=True, rngs=rngs, layers=layers)
        self.output = Linear(width, width, axes=("heads", "embed"), bias=True, rngs=rngs, layers=layers)
        self.mlp = MLP(width, config.intermediate_size, activation=jax.nn.gelu, rngs=rngs, layers=layers)

    def __call__(self, x_BPD, _, segments_BP, cos_BPK, sin_BPK):
        normed = self.norm1(x_BPD)
        query, key, value = (split_heads(project(normed), self.heads) for project in (self.query, self.key, self.value))
        query, key = rotate(query, cos_BPK, sin_BPK), rotate(key, cos_BPK, sin_BPK)
        mixed = attention(query, key, value, segments_BP, causal=False)
        x_BPD = x_BPD + self.output(mixed.reshape(x_BPD.shape))
        return constrain(x_BPD + self.mlp(self.norm2(x_BPD)), "batch", None, None)


class Merger(nnx.Module):
    """Merges each 2x2 square of patches into a unit of the language model's width. The norm is before or after concatenation."""

    def __init__(self, config: VisionConfig, width: int, *, norm_joined: bool, rngs: nnx.Rngs, layers: int | None = None):
        self.joined, self.norm_joined = config.hidden_size * config.spatial_merge_size**2, norm_joined
        self.norm = LayerNorm(self.joined if norm_joined else config.hidden_size, epsilon=1e-6, rngs=rngs, layers=layers)
        self.up = Linear(self.joined, self.joined, axes=("embed", "mlp"), bias=True, rngs=rngs, layers=layers)
        self.down = Linear(self.joined, width, axes=("mlp", "embed"), bias=True, rngs=rngs, layers=layers)

    def __call__(self, x_BPD: Float[Array, "B P D"]) -> Float[Array, "B U D"]:
        joined = (x_BPD.shape[0], -1, self.joined)
        normed = self.norm(x_BPD.reshape(joined)) if self.norm_joined else self.norm(x_BPD).reshape(joined)
        return self.down(jax.nn.gelu(self.up(normed), approximate=False))


class VisionTower(nnx.Module):
    """Turns the patches of a row's images into units of the language model's width."""

    def __init__(self, config: VisionConfig, width: int, *, rngs: nnx.Rngs):
        self.config = config
        inner, table = config.hidden_size, (config.num_position_embeddings, config.hidden_size)
        self.patch_embedding = Linear(3 * config.patch_size**2, inner, axes=("patch", "embed"), bias=True, rngs=rngs)
        self.position_table = param(rngs, jax.nn.initializers.normal(0.02), table, (None, "embed"))
        self.blocks = VisionBlock(config, rngs=rngs, layers=config.depth)
        self.merger = Merger(config, width, norm_joined=False, rngs=rngs)
        self.deepstack = Merger(config, width, norm_joined=True, rngs=rngs, layers=len(config.deepstack_visual_indexes))

    def __call__(
        self, batch: Batch, *, dtype, checkpoint: bool, unroll: int
    ) -> tuple[Float[Array, "B U D"], Float[Array, "N B U D"]]:
        """Return the units, and those of DeepStack. Units of padding are finite, and are not read."""
        assert batch.patches is not None  # a row without patches does not come here
        positions_BP2 = batch.patch_arrays["patch_positions"]
        x_BPD = self.embed_patches(batch.patches, positions_BP2, batch.patch_arrays["patch_grid"], dtype)
        context = batch.patch_segments, *patch_angles(positions_BP2, self.config.hidden_size // self.config.num_heads)
        kept = self.config.deepstack_visual_indexes
        x_BPD, kept_NBPD = scan_and_keep(self.blocks, x_BPD, kept, *context, checkpoint=checkpoint, unroll=unroll)
        return self.merger(x_BPD), self.merge_kept(kept_NBPD)

    def embed_patches(
        self, patches_BPX: UInt8[Array, "B P X"], positions_BP2: Int[Array, "B P 2"], grid_BP2: Int[Array, "B P 2"], dtype
    ) -> Float[Array, "B P D"]:
        """Normalise pixels, apply the patch kernel (the temporal kernel, summed over two equal frames), add learned positions."""
        pixels = normalised(patches_BPX, self.config.image_mean, self.config.image_std)
        x_BPD = self.patch_embedding(pixels.astype(dtype)) + self.learned_positions(positions_BP2, grid_BP2).astype(dtype)
        return constrain(x_BPD, "batch", None, None)

    def learned_positions(self, positions_BP2: Int[Array, "B P 2"], grid_BP2: Int[Array, "B P 2"]) -> Float[Array, "B P D"]:
        """Interpolate the square table of positions to each image's grid, bilinearly; the corners of both coincide."""
        side = self.config.table_side
        point_BP2 = positions_BP2.astype(jnp.float32) * (side - 1) / jnp.maximum(grid_BP2 - 1, 1)
        corner_BP2 = jnp.floor(point_BP2)
        beyond_BP2 = point_BP2 - corner_BP2
        terms_BPD = []
        for corner in np.ndindex(2, 2):
            row_BP, column_BP = jnp.moveaxis(jnp.minimum(corner_BP2.astype(jnp.int32) + jnp.asarray(corner), side - 1), -1, 0)
            weight_BP = jnp.where(jnp.asarray(corner), beyond_BP2, 1 - beyond_BP2).prod(axis=-1)
            terms_BPD.append(weight_BP[..., None] * jnp.take(self.position_table[...], row_BP * side + column_BP, axis=0))
        return functools.reduce(jnp.add, terms_BPD)

    def merge_kept(self, kept_NBPD: Float[Array, "N B P D"]) -> Float[Array, "N B U D"]:
        """Run each of the kept states through its merger."""
        graph, state = nnx.split(self.deepstack)
        return jax.lax.map(lambda layer: nnx.merge(graph, layer[0])(layer[1]), (state, kept_NBPD))


class DecoderLayer(nnx.Module):
    """Pre-norm causal attention with grouped heads, queries and keys normed, and a gated feed-forward, all without biases."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, layers: int):
        width, eps = config.hidden_size, config.rms_norm_eps
        self.heads, self.key_value_heads = config.num_attention_heads, config.num_key_value_heads
        query_width, key_value_width = self.heads * config.head_width, self.key_value_heads * config.head_width
        self.input_norm = RMSNorm(width, epsilon=eps, rngs=rngs, layers=layers)
        self.mlp_norm = RMSNorm(width, epsilon=eps, rngs=rngs, layers=layers)
        self.query_norm = RMSNorm(config.head_width, epsilon=eps, rngs=rngs, layers=layers)
        self.key_norm = RMSNorm(config.head_width, epsilon=eps, rngs=rngs, layers=layers)
        self.query = Linear(width, query_width, axes=("embed", "heads"), bias=False, rngs=rngs, layers=layers)
        self.key = Linear(width, key_value_width, axes=("embed", "heads"), bias=False, rngs=rngs, layers=layers)
        self.value = Linear(width, key_value_width, axes=("embed", "heads"), bias=False, rngs=rngs, layers=layers)
        self.output = Linear(query_width, width, axes=("heads", "embed"), bias=False, rngs=rngs, layers=layers)
        self.mlp = GatedMLP(width, config.intermediate_size, bias=False, rngs=rngs, layers=layers)

    def __call__(self, x_BSD, number, segments_BS, cos_BSK, sin_BSK, features_NBSD=None, reads_BV=None):
        """Return the layer's output at the positions `reads_BV` (all by default), plus a feature in the first N layers."""
        normed = self.input_norm(x_BSD)
        key_BSGK = rotate(self.key_norm(split_heads(self.key(normed), self.key_value_heads)), cos_BSK, sin_BSK)
        value_BSGK = split_heads(self.value(normed), self.key_value_heads)
        x_BSD, normed, cos_BSK, sin_BSK = (at(x, reads_BV) for x in (x_BSD, normed, cos_BSK, sin_BSK))
        query_BSHK = rotate(self.query_norm(split_heads(self.query(normed), self.heads)), cos_BSK, sin_BSK)
        mixed = attention(query_BSHK, key_BSGK, value_BSGK, segments_BS, causal=True, positions_BS=reads_BV)
        x_BSD = x_BSD + self.output(mixed.reshape(*x_BSD.shape[:2], -1))
        x_BSD = x_BSD + self.mlp(self.mlp_norm(x_BSD))
        if features_NBSD is not None:
            # An index past the end reads the last feature. Indexing, rather than scanning, adds a feature's gradient in place.
            feature_BSD = at(jax.lax.dynamic_index_in_dim(features_NBSD, number, keepdims=False), reads_BV)
            x_BSD = x_BSD + jnp.where(number < len(features_NBSD), feature_BSD, 0)
        return constrain(x_BSD, "batch", None, None)


class Backbone(network.Backbone):
    """Qwen-VL's backbone with DeepStack."""

    tower, layer = VisionTower, DecoderLayer

    def insert(self, tower_output: Any, visual_BS: Int[Array, "B S"], x_BSD: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Put the units in place of the image tokens."""
        return place_units(tower_output[0], visual_BS, x_BSD)

    def context(self, batch: Batch, tower_output: Any) -> tuple:
        """Return segments, cosines and sines, and DeepStack's features [N, B, S, D]: at the image tokens, and zero elsewhere."""
        context = super().context(batch, tower_output)
        if tower_output is None:
            return context
        units_NBUD = tower_output[1]
        features_NBSD = jax.vmap(place_units, in_axes=(0, None, None))(units_NBUD, batch.visual, jnp.zeros((), units_NBUD.dtype))
        return *context, constrain(features_NBSD, None, "batch", None, None)

    @staticmethod
    def mrope_axes(sections: tuple[int, int, int]) -> Int[np.ndarray, "K/2"]:
        """Return interleaved axes: of every three frequencies, one is of time, one of rows and one of columns.

        Beyond the end of the section of rows, or of columns, its frequencies are of time.
        """
        axes = np.zeros(sum(sections), np.int32)
        for axis in (1, 2):
            axes[axis : 3 * sections[axis] : 3] = axis
        return axes


def flop_counts(config: Config, row: Size) -> tuple[FlopCount, ...]:
    """Count the network on a row; see `backbones.flop_counts`."""
    vision = vision_counts(config.vision_config, row.patches) if row.patches else ()
    return (*vision, *language_counts(config.text_config, row.tokens, row.vectors))


def vision_counts(config: VisionConfig, P: int) -> tuple[FlopCount, ...]:
    """Count the tower on a row of P patches."""
    heads, units = (config.num_heads, config.num_heads, config.hidden_size // config.num_heads), P // config.spatial_merge_size**2
    return (
        FlopCount("vision.patch_embedding", P),
        FlopCount("vision.position_table", P),
        FlopCount("vision.blocks", P, config.hidden_size, (AttentionCount(config.depth, P, P, P, *heads),), last="mlp.down"),
        *(FlopCount(f"vision.{merger}.{name}", units) for merger in ("merger", "deepstack") for name in ("norm", "up", "down")),
    )
