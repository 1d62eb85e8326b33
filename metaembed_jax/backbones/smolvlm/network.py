"""SmolVLM (arXiv 2504.05299): SigLIP's vision tower before a Llama. Correct is what transformers' `modeling_idefics3.py` computes.

B rows, S tokens, V positions that are read, R Meta Tokens, P patches of a row, T tiles of all rows, N patches of a tile, U units
(squares of patches, each one visual token), D width, H heads, G key/value heads, K head width, L layers, X numbers in a patch.

An image is several tiles and comes once more as a whole, which is a tile like any other: the tower sees each by itself, and only
the language model, which is causal, sees them together.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from metaembed_jax.backbones.attention import attention
from metaembed_jax.backbones.layers import (
    GatedMLP,
    LayerNorm,
    Linear,
    RMSNorm,
    at,
    embed_tokens,
    inverse_frequencies,
    normalised,
    param,
    place_units,
    rotate,
    scan_layers,
    split_heads,
)
from metaembed_jax.backbones.paligemma.network import VisionBlock
from metaembed_jax.backbones.smolvlm.config import Config, TextConfig, VisionConfig
from metaembed_jax.batch.rows import Batch
from metaembed_jax.sharding import constrain


class VisionTower(nnx.Module):
    """Tiles to visual tokens of the language model's width."""

    def __init__(self, config: VisionConfig, width: int, *, rngs: nnx.Rngs):
        self.config = config
        inner = config.hidden_size
        self.patch_embedding = Linear(3 * config.patch_size**2, inner, axes=("patch", "embed"), bias=True, rngs=rngs)
        self.positions = param(rngs, jax.nn.initializers.normal(inner**-0.5), (config.tile_patches, inner), (None, "embed"))
        self.blocks = VisionBlock(config, rngs=rngs, layers=config.num_hidden_layers)
        self.final_norm = LayerNorm(inner, epsilon=config.layer_norm_eps, rngs=rngs)
        self.projector = Linear(inner * config.scale_factor**2, width, axes=("mlp", "embed"), bias=False, rngs=rngs)

    def __call__(self, patches_BPX: UInt8[Array, "B P X"], *, dtype, checkpoint: bool, unroll: int) -> Float[Array, "B U D"]:
        """One visual token for each unit, tile after tile."""
        B, P, X = patches_BPX.shape
        x_TND = self.embed_patches(patches_BPX.reshape(-1, self.config.tile_patches, X), dtype)
        x_TND = scan_layers(self.blocks, x_TND, None, checkpoint=checkpoint, unroll=unroll)
        x_BUD = self.merge(self.final_norm(x_TND)).reshape(B, P // self.config.scale_factor**2, -1)
        return constrain(x_BUD, "batch", None, None)

    def embed_patches(self, patches_TNX: UInt8[Array, "T N X"], dtype) -> Float[Array, "T N D"]:
        """uint8 pixels to normalised floats, then the patch kernel, and what is learned of each place in a tile."""
        pixels_TNX = normalised(patches_TNX, self.config.image_mean, self.config.image_std)
        x_TND = self.patch_embedding(pixels_TNX.astype(dtype)) + self.positions[...].astype(dtype)
        return constrain(x_TND, "batch", None, None)

    def merge(self, x_TND: Float[Array, "T N D"]) -> Float[Array, "T N/scale**2 width"]:
        """The states of a unit's patches, in raster order behind each other, to one visual token ("pixel shuffle")."""
        side = self.config.side // self.config.scale_factor
        units = rearrange(x_TND, "t (r i c j) d -> t (r c) (i j d)", r=side, c=side, i=self.config.scale_factor)
        return self.projector(units)


class DecoderLayer(nnx.Module):
    """Pre-norm causal attention with grouped heads and a gated feed-forward; no biases."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, layers: int):
        width, epsilon = config.hidden_size, config.rms_norm_eps
        self.heads, self.key_value_heads = config.num_attention_heads, config.num_key_value_heads
        key_value_width = self.key_value_heads * config.head_width
        self.input_norm = RMSNorm(width, epsilon=epsilon, rngs=rngs, layers=layers)
        self.mlp_norm = RMSNorm(width, epsilon=epsilon, rngs=rngs, layers=layers)
        self.query = Linear(width, width, axes=("embed", "heads"), bias=False, rngs=rngs, layers=layers)
        self.key = Linear(width, key_value_width, axes=("embed", "heads"), bias=False, rngs=rngs, layers=layers)
        self.value = Linear(width, key_value_width, axes=("embed", "heads"), bias=False, rngs=rngs, layers=layers)
        self.output = Linear(width, width, axes=("heads", "embed"), bias=False, rngs=rngs, layers=layers)
        self.mlp = GatedMLP(width, config.intermediate_size, bias=False, rngs=rngs, layers=layers)

    def __call__(self, x_BSD, _, segments_BS, cos_BSK, sin_BSK):
        normed = self.input_norm(x_BSD)
        query_BSHK = rotate(split_heads(self.query(normed), self.heads), cos_BSK, sin_BSK)
        key_BSGK = rotate(split_heads(self.key(normed), self.key_value_heads), cos_BSK, sin_BSK)
        value_BSGK = split_heads(self.value(normed), self.key_value_heads)
        mixed = attention(query_BSHK, key_BSGK, value_BSGK, segments_BS, segments_BS, causal=True)
        x_BSD = x_BSD + self.output(mixed.reshape(x_BSD.shape))
        return constrain(x_BSD + self.mlp(self.mlp_norm(x_BSD)), "batch", None, None)


class Backbone(nnx.Module):
    """Vision tower and language model; it returns the last hidden states at the positions that a batch names."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        text = config.text_config
        self.vision = VisionTower(config.vision_config, text.hidden_size, rngs=rngs)
        self.embedding = param(rngs, jax.nn.initializers.normal(0.02), (text.vocab_size, text.hidden_size), ("vocabulary", "embed"))
        self.layers = DecoderLayer(text, rngs=rngs, layers=text.num_hidden_layers)
        self.final_norm = RMSNorm(text.hidden_size, epsilon=text.rms_norm_eps, rngs=rngs)

    @property
    def width(self) -> int:
        """The hidden size D."""
        return self.config.width

    def __call__(
        self, batch: Batch, meta_RD: Float[Array, "R D"], *, dtype, checkpoint: bool, unroll: int
    ) -> Float[Array, "B V D"]:
        """Last-layer states, after the final norm, at `batch.reads`.

        Args:
          batch: patches of whole tiles.
          meta_RD: the table of Meta Tokens.
          dtype: of activations and matmuls.
          checkpoint, unroll: as in `scan_layers`.
        """
        how = {"checkpoint": checkpoint, "unroll": unroll}
        x_BSD = embed_tokens(self.embedding[...].astype(dtype), meta_RD.astype(dtype), batch)
        if batch.patches is not None:
            with jax.named_scope("vision"):
                units_BUD = self.vision(batch.patches, dtype=dtype, **how)
            x_BSD = place_units(units_BUD, batch.visual, x_BSD)
        context = batch.segments, *self.rotary(batch.positions[:, 0])
        with jax.named_scope("language"):
            x_BSD = scan_layers(self.layers, constrain(x_BSD, "batch", None, None), None, *context, **how)
            return self.final_norm(at(x_BSD, batch.reads))

    def rotary(self, positions_BS: Int[Array, "B S"]) -> tuple[Float[Array, "B S K"], Float[Array, "B S K"]]:
        """Cosines and sines of each position's angles."""
        text = self.config.text_config
        angles = positions_BS[..., None].astype(jnp.float32) * inverse_frequencies(text.head_width, text.rope_theta)
        angles = jnp.concatenate([angles, angles], axis=-1)
        return jnp.cos(angles), jnp.sin(angles)
