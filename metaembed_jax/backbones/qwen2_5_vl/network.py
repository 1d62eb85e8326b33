"""Qwen2.5-VL (arXiv 2502.13923). Correct is what transformers' `modeling_qwen2_5_vl.py` computes from the same checkpoint.

B batch, S prompt tokens, R appended rows, P patches, U units (merged 2x2 patches), W patches of a window, D width,
H heads, G key/value heads, K head width, L layers, X numbers in a patch.

Patches come from the host ordered by window, every window padded to its full size, so windowed attention is a reshape:

    [B, P, D] -> [B * P/W, W, D] -> attention -> [B, P, D]
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from metaembed_jax.backbones.attention import attention
from metaembed_jax.backbones.layers import (
    GatedMLP,
    Linear,
    RMSNorm,
    inverse_frequencies,
    param,
    read_last,
    rotate,
    scan_layers,
    split_heads,
)
from metaembed_jax.backbones.qwen2_5_vl.config import Config, TextConfig, VisionConfig
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

    def __call__(self, x_BPD, full, mask_BP, cos_BPK, sin_BPK):
        normed = self.norm1(x_BPD)
        B, P, _ = normed.shape
        query, key, value = (split_heads(project(normed), self.heads) for project in (self.query, self.key, self.value))
        query, key = rotate(query, cos_BPK, sin_BPK), rotate(key, cos_BPK, sin_BPK)

        def within(size):
            def attend(query, key, value):
                split = [part.reshape(-1, size, *part.shape[2:]) for part in (query, key, value)]
                return attention(*split, mask_BP.reshape(-1, size), causal=False).reshape(query.shape)

            return attend

        if P == self.window:
            mixed = within(P)(query, key, value)
        else:
            mixed = jax.lax.cond(full, within(P), within(self.window), query, key, value)
        x_BPD = x_BPD + self.output(mixed.reshape(B, P, -1))
        return constrain(x_BPD + self.mlp(self.norm2(x_BPD)), "batch", None, None)


class VisionTower(nnx.Module):
    """Patches of one image per row to language-width units."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, merged = config.hidden_size, config.hidden_size * config.spatial_merge_size**2
        self.patch_embedding = Linear(3 * config.patch_size**2, width, axes=("patch", "embed"), bias=False, rngs=rngs)
        self.blocks = VisionBlock(config, rngs=rngs, layers=config.depth)
        self.merger_norm = RMSNorm(width, epsilon=1e-6, rngs=rngs)
        self.merger_up = Linear(merged, merged, axes=("embed", "mlp"), bias=True, rngs=rngs)
        self.merger_down = Linear(merged, config.out_hidden_size, axes=("mlp", "embed"), bias=True, rngs=rngs)

    def __call__(
        self,
        patches_BPX: UInt8[Array, "B P X"],
        positions_BP2: Int[Array, "B P 2"],
        mask_BP: Bool[Array, "B P"],
        *,
        dtype,
        checkpoint: bool,
        unroll: int,
    ) -> Float[Array, "B U D"]:
        """The units in window order; those of padding hold finite numbers that nothing reads."""
        x_BPD = self.embed_patches(patches_BPX, dtype)
        cos, sin = self.rotary(positions_BP2)
        full = jnp.isin(jnp.arange(self.config.depth), jnp.asarray(self.config.fullatt_block_indexes, jnp.int32))
        x_BPD = scan_layers(self.blocks, x_BPD, full, mask_BP, cos, sin, checkpoint=checkpoint, unroll=unroll)
        return self.merge(x_BPD)

    def embed_patches(self, patches_BPX: UInt8[Array, "B P X"], dtype) -> Float[Array, "B P D"]:
        """uint8 pixels to normalised floats, then the patch kernel (the temporal kernel, summed over two equal frames)."""
        pixels = patches_BPX.astype(jnp.float32).reshape(*patches_BPX.shape[:2], 3, -1) / 255.0
        mean, std = (jnp.asarray(values, jnp.float32)[:, None] for values in (self.config.image_mean, self.config.image_std))
        return constrain(
            self.patch_embedding(((pixels - mean) / std).reshape(patches_BPX.shape).astype(dtype)), "batch", None, None
        )

    def rotary(self, positions_BP2: Int[Array, "B P 2"]) -> tuple[Float[Array, "B P K"], Float[Array, "B P K"]]:
        """Half of the angles turn with the row of a patch, half with its column."""
        half = self.config.hidden_size // self.config.num_heads // 2
        angles = positions_BP2[..., None].astype(jnp.float32) * inverse_frequencies(half, 10000.0)
        angles = angles.reshape(*positions_BP2.shape[:2], half)
        angles = jnp.concatenate([angles, angles], axis=-1)
        return jnp.cos(angles), jnp.sin(angles)

    def merge(self, x_BPD: Float[Array, "B P D"]) -> Float[Array, "B U D"]:
        """Each 2x2 block of patches becomes one unit of the language model's width."""
        normed = self.merger_norm(x_BPD)
        units = normed.reshape(normed.shape[0], -1, normed.shape[-1] * self.config.spatial_merge_size**2)
        return self.merger_down(jax.nn.gelu(self.merger_up(units), approximate=False))


class DecoderLayer(nnx.Module):
    """Pre-norm causal attention with grouped heads (biases on q, k, v), and a gated feed-forward without biases."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, layers: int):
        width = config.hidden_size
        head_width = width // config.num_attention_heads
        self.heads, self.key_value_heads = config.num_attention_heads, config.num_key_value_heads
        key_value_width = self.key_value_heads * head_width
        self.input_norm = RMSNorm(width, epsilon=config.rms_norm_eps, rngs=rngs, layers=layers)
        self.mlp_norm = RMSNorm(width, epsilon=config.rms_norm_eps, rngs=rngs, layers=layers)
        self.query = Linear(width, width, axes=("embed", "heads"), bias=True, rngs=rngs, layers=layers)
        self.key = Linear(width, key_value_width, axes=("embed", "heads"), bias=True, rngs=rngs, layers=layers)
        self.value = Linear(width, key_value_width, axes=("embed", "heads"), bias=True, rngs=rngs, layers=layers)
        self.output = Linear(width, width, axes=("heads", "embed"), bias=False, rngs=rngs, layers=layers)
        self.mlp = GatedMLP(width, config.intermediate_size, bias=False, rngs=rngs, layers=layers)

    def __call__(self, x_BSD, _, mask_BS, cos_BSK, sin_BSK, keep: int = 0):
        """The layer's output at the last `keep` positions (all by default)."""
        normed = self.input_norm(x_BSD)
        key_BSGK = rotate(split_heads(self.key(normed), self.key_value_heads), cos_BSK, sin_BSK)
        value_BSGK = split_heads(self.value(normed), self.key_value_heads)
        x_BSD, normed, cos_BSK, sin_BSK = (rows[:, -keep:] for rows in (x_BSD, normed, cos_BSK, sin_BSK))
        query_BSHK = rotate(split_heads(self.query(normed), self.heads), cos_BSK, sin_BSK)
        mixed = attention(query_BSHK, key_BSGK, value_BSGK, mask_BS, causal=True)
        x_BSD = x_BSD + self.output(mixed.reshape(x_BSD.shape))
        return constrain(x_BSD + self.mlp(self.mlp_norm(x_BSD)), "batch", None, None)


class Backbone(nnx.Module):
    """Vision tower and language model; what it returns are the last hidden states of the rows appended to each prompt."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        text = config.text_config
        self.vision = VisionTower(config.vision_config, rngs=rngs)
        self.embedding = param(rngs, jax.nn.initializers.normal(0.02), (text.vocab_size, text.hidden_size), ("vocabulary", "embed"))
        self.layers = DecoderLayer(text, rngs=rngs, layers=text.num_hidden_layers)
        self.final_norm = RMSNorm(text.hidden_size, epsilon=text.rms_norm_eps, rngs=rngs)

    @property
    def width(self) -> int:
        """The hidden size D."""
        return self.config.width

    def __call__(
        self, batch: dict[str, Array], suffix_RD: Float[Array, "R D"], *, keep: int, dtype, checkpoint: bool, unroll: int
    ) -> Float[Array, "B keep D"]:
        """Last-layer states, after the final norm, of the last `keep` of the rows `suffix_RD` appended to every prompt.

        Args:
          batch: `tokens` [B, S], `positions` [B, 3, S], `mask` [B, S], `visual_index` [B, S], left-padded; with images also
            `patches` [B, P, X] uint8, `patch_positions` [B, P, 2], `patch_mask` [B, P].
          suffix_RD: rows that stand in the embedding table's place after the prompt.
          dtype: of activations and matmuls.
          checkpoint, unroll: as in `scan_layers`.
        """
        x_BSD = self.embed(batch, dtype, checkpoint, unroll)
        B, R = x_BSD.shape[0], suffix_RD.shape[0]
        suffix_BRD = jnp.broadcast_to(suffix_RD.astype(dtype), (B, *suffix_RD.shape))
        x_BSD = constrain(jnp.concatenate([x_BSD, suffix_BRD], axis=1), "batch", None, None)
        mask_BS = jnp.pad(batch["mask"], ((0, 0), (0, R)), constant_values=True)
        cos, sin = self.rotary(extend_positions(batch["positions"], R))
        with jax.named_scope("language"):
            x_BSD = read_last(self.layers, x_BSD, None, mask_BS, cos, sin, keep=keep, checkpoint=checkpoint, unroll=unroll)
            return self.final_norm(x_BSD)

    def embed(self, batch: dict[str, Array], dtype, checkpoint: bool, unroll: int) -> Float[Array, "B S D"]:
        """Rows of the vocabulary, with the units of the image where `visual_index` points at one."""
        x_BSD = jnp.take(self.embedding[...].astype(dtype), batch["tokens"], axis=0)
        if "patches" not in batch:
            return x_BSD
        patches = (batch["patches"], batch["patch_positions"], batch["patch_mask"])
        with jax.named_scope("vision"):
            units_BUD = self.vision(*patches, dtype=dtype, checkpoint=checkpoint, unroll=unroll)
        index_BS = batch["visual_index"]
        placed_BSD = jnp.take_along_axis(units_BUD, jnp.maximum(index_BS, 0)[..., None], axis=1)
        return jnp.where(index_BS[..., None] >= 0, placed_BSD, x_BSD)

    def rotary(self, positions_B3S: Int[Array, "B 3 S"]) -> tuple[Float[Array, "B S K"], Float[Array, "B S K"]]:
        """M-RoPE: consecutive sections of the frequencies turn with time, row and column."""
        text = self.config.text_config
        frequencies = inverse_frequencies(text.hidden_size // text.num_attention_heads, text.rope_theta)
        axis = jnp.repeat(jnp.arange(3), jnp.asarray(text.mrope_section), total_repeat_length=frequencies.shape[0])
        angles = jnp.take(positions_B3S, axis, axis=1).swapaxes(1, 2).astype(jnp.float32) * frequencies
        angles = jnp.concatenate([angles, angles], axis=-1)
        return jnp.cos(angles), jnp.sin(angles)


def extend_positions(positions_B3S: Int[Array, "B 3 S"], rows: int) -> Int[Array, "B 3 S+rows"]:
    """Appended rows count on as text: one past the largest position of the prompt, alike on all three axes."""
    start_B11 = positions_B3S.max(axis=(1, 2), keepdims=True) + 1
    suffix = jnp.broadcast_to(start_B11 + jnp.arange(rows), (positions_B3S.shape[0], 3, rows))
    return jnp.concatenate([positions_B3S, suffix], axis=-1)
