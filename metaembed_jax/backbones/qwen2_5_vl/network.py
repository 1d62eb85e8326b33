"""Qwen2.5-VL (arXiv 2502.13923), as transformers' `modeling_qwen2_5_vl.py` computes it from the same checkpoint.

B rows, S tokens, V positions that are read, P patches, U units (merged 2x2 patches), D width, H heads, G key/value heads,
K head width, X numbers in a patch.

Patches come from the host in slots of a window's size (`inputs`), so windowed attention is a reshape and a mask.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from metaembed_jax.backbones.attention import attention
from metaembed_jax.backbones.attention_windows import window_attention
from metaembed_jax.backbones.flop_counts import AttentionCount, FlopCount
from metaembed_jax.backbones.layers import GatedMLP, Linear, RMSNorm, at, normalised, rotate, scan_layers, split_heads
from metaembed_jax.backbones.qwen import network
from metaembed_jax.backbones.qwen.network import language_counts, patch_angles
from metaembed_jax.backbones.qwen2_5_vl.config import Config, TextConfig, VisionConfig
from metaembed_jax.batch.items import Size
from metaembed_jax.batch.rows import Batch
from metaembed_jax.sharding import constrain


class VisionBlock(nnx.Module):
    """Pre-norm attention, in windows or over the image, and a gated feed-forward, all with biases."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, layers: int):
        width = config.hidden_size
        self.heads, self.window = config.num_heads, config.window_patches
        self.norm1 = RMSNorm(width, epsilon=1e-6, rngs=rngs, layers=layers)
        self.norm2 = RMSNorm(width, epsilon=1e-6, rngs=rngs, layers=layers)
        self.query = Linear(width, width, axes=("embed", "heads"), bias=True, rngs=rngs, layers=layers)
        self.key = Linear(width, width, axes=("embed", "heads"), bias=True, rngs=rngs, layers=layers)
        self.value = Linear(width, width, axes=("embed", "heads"), bias=True, rngs=rngs, layers=layers)
        self.output = Linear(width, width, axes=("heads", "embed"), bias=True, rngs=rngs, layers=layers)
        self.mlp = GatedMLP(width, config.intermediate_size, bias=True, rngs=rngs, layers=layers)

    def __call__(self, x_BPD, full, segments_BP, windows_BP, cos_BPK, sin_BPK):
        normed = self.norm1(x_BPD)
        projected = [project(normed) for project in (self.query, self.key, self.value)]

        def over_image(query_BPD, key_BPD, value_BPD):
            query, key, value = (split_heads(x, self.heads) for x in (query_BPD, key_BPD, value_BPD))
            query, key = rotate(query, cos_BPK, sin_BPK), rotate(key, cos_BPK, sin_BPK)
            return attention(query, key, value, segments_BP, causal=False).reshape(query_BPD.shape)

        def over_windows(query_BPD, key_BPD, value_BPD):
            rotation = cos_BPK, sin_BPK
            return window_attention(query_BPD, key_BPD, value_BPD, *rotation, windows_BP, heads=self.heads, window=self.window)

        x_BPD = x_BPD + self.output(jax.lax.cond(full, over_image, over_windows, *projected))
        return constrain(x_BPD + self.mlp(self.norm2(x_BPD)), "batch", None, None)


class VisionTower(nnx.Module):
    """Turns the patches of a row's images into units of the language model's width."""

    def __init__(self, config: VisionConfig, width: int, *, rngs: nnx.Rngs):
        self.config = config
        inner, merged = config.hidden_size, config.hidden_size * config.spatial_merge_size**2
        self.patch_embedding = Linear(3 * config.patch_size**2, inner, axes=("patch", "embed"), bias=False, rngs=rngs)
        self.blocks = VisionBlock(config, rngs=rngs, layers=config.depth)
        self.merger_norm = RMSNorm(inner, epsilon=1e-6, rngs=rngs)
        self.merger_up = Linear(merged, merged, axes=("embed", "mlp"), bias=True, rngs=rngs)
        self.merger_down = Linear(merged, width, axes=("mlp", "embed"), bias=True, rngs=rngs)

    def __call__(self, batch: Batch, *, dtype, checkpoint: bool, unroll: int) -> Float[Array, "B U D"]:
        """Return the units of each row's images. Units of padding are finite, and are not read."""
        assert batch.patches is not None  # a row without patches does not come here
        x_BPD = self.embed_patches(batch.patches, dtype)
        cos, sin = patch_angles(batch.patch_arrays["patch_positions"], self.config.hidden_size // self.config.num_heads)
        full = jnp.isin(jnp.arange(self.config.depth), jnp.asarray(self.config.fullatt_block_indexes, jnp.int32))
        context = batch.patch_segments, batch.patch_arrays["windows"], cos, sin
        return self.merge(scan_layers(self.blocks, x_BPD, full, *context, checkpoint=checkpoint, unroll=unroll))

    def embed_patches(self, patches_BPX: UInt8[Array, "B P X"], dtype) -> Float[Array, "B P D"]:
        """Normalise uint8 pixels, and apply the patch kernel (the temporal kernel, summed over two equal frames)."""
        pixels = normalised(patches_BPX, self.config.image_mean, self.config.image_std)
        return constrain(self.patch_embedding(pixels.astype(dtype)), "batch", None, None)

    def merge(self, x_BPD: Float[Array, "B P D"]) -> Float[Array, "B U D"]:
        """Merge each 2x2 square of patches into a unit of the language model's width."""
        normed = self.merger_norm(x_BPD)
        units = normed.reshape(normed.shape[0], -1, normed.shape[-1] * self.config.spatial_merge_size**2)
        return self.merger_down(jax.nn.gelu(self.merger_up(units), approximate=False))


class DecoderLayer(nnx.Module):
    """Pre-norm causal attention with grouped heads (biases on q, k, v), and a gated feed-forward without biases."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, layers: int):
        width = config.hidden_size
        self.heads, self.key_value_heads = config.num_attention_heads, config.num_key_value_heads
        key_value_width = self.key_value_heads * config.head_width
        self.input_norm = RMSNorm(width, epsilon=config.rms_norm_eps, rngs=rngs, layers=layers)
        self.mlp_norm = RMSNorm(width, epsilon=config.rms_norm_eps, rngs=rngs, layers=layers)
        self.query = Linear(width, width, axes=("embed", "heads"), bias=True, rngs=rngs, layers=layers)
        self.key = Linear(width, key_value_width, axes=("embed", "heads"), bias=True, rngs=rngs, layers=layers)
        self.value = Linear(width, key_value_width, axes=("embed", "heads"), bias=True, rngs=rngs, layers=layers)
        self.output = Linear(width, width, axes=("heads", "embed"), bias=False, rngs=rngs, layers=layers)
        self.mlp = GatedMLP(width, config.intermediate_size, bias=False, rngs=rngs, layers=layers)

    def __call__(self, x_BSD, _, segments_BS, cos_BSK, sin_BSK, reads_BV=None):
        """Return the layer's output at the positions `reads_BV` (all by default)."""
        normed = self.input_norm(x_BSD)
        key_BSGK = rotate(split_heads(self.key(normed), self.key_value_heads), cos_BSK, sin_BSK)
        value_BSGK = split_heads(self.value(normed), self.key_value_heads)
        x_BSD, normed, cos_BSK, sin_BSK = (at(x, reads_BV) for x in (x_BSD, normed, cos_BSK, sin_BSK))
        query_BSHK = rotate(split_heads(self.query(normed), self.heads), cos_BSK, sin_BSK)
        mixed = attention(query_BSHK, key_BSGK, value_BSGK, segments_BS, causal=True, positions_BS=reads_BV)
        x_BSD = x_BSD + self.output(mixed.reshape(x_BSD.shape))
        return constrain(x_BSD + self.mlp(self.mlp_norm(x_BSD)), "batch", None, None)


class Backbone(network.Backbone):
    """Qwen-VL's backbone, with windows in the tower."""

    tower, layer = VisionTower, DecoderLayer

    @staticmethod
    def mrope_axes(sections: tuple[int, int, int]) -> Int[np.ndarray, "K/2"]:
        """Return the axes of consecutive sections: frequencies that turn with time, row and column."""
        return np.repeat(np.arange(3), sections)


def flop_counts(config: Config, row: Size) -> tuple[FlopCount, ...]:
    """Count the network on a row; see `backbones.flop_counts`."""
    vision = vision_counts(config.vision_config, row.patches) if row.patches else ()
    return (*vision, *language_counts(config.text_config, row.tokens, row.vectors))


def vision_counts(config: VisionConfig, P: int) -> tuple[FlopCount, ...]:
    """Count the tower on a row of P patches."""
    heads = (config.num_heads, config.num_heads, config.hidden_size // config.num_heads)
    full, units = len(set(config.fullatt_block_indexes) & set(range(config.depth))), P // config.spatial_merge_size**2
    over_windows = AttentionCount(config.depth - full, P, P, config.window_patches, *heads)
    over_image = AttentionCount(full, P, P, P, *heads)
    return (
        FlopCount("vision.patch_embedding", P),
        FlopCount("vision.blocks", P, config.hidden_size, (over_windows, over_image), last="mlp.down"),
        FlopCount("vision.merger_norm", P),
        FlopCount("vision.merger_up", units),
        FlopCount("vision.merger_down", units),
    )
