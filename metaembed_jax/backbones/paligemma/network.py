"""PaliGemma 1 and 2 (arXiv 2407.07726, 2412.03555): SigLIP's vision tower before Gemma or Gemma 2.

Correct is what transformers' `modeling_paligemma.py` computes from the same checkpoint.

B rows, S tokens, V positions that are read, R Meta Tokens, P patches of a row, I images of all rows, N patches of an image,
D width, H heads, G key/value heads, K head width, L layers, X numbers in a patch.

Image and prompt of an item are a prefix, whose tokens see each other in both directions; its Meta Tokens see the prefix and,
causally, themselves. For an item of 3 tokens and 3 Meta Tokens, and the beginning of the next one in the row; a local layer with a
window of 5 lacks what is marked `o`:

                 i  p  p  m  m  m  p  p
    image        x  x  x  .  .  .  .  .
    prompt       x  x  x  .  .  .  .  .
    prompt       x  x  x  .  .  .  .  .
    Meta Token   x  x  x  x  .  .  .  .
    Meta Token   x  x  x  x  x  .  .  .
    Meta Token   o  x  x  x  x  x  .  .
    prompt       .  .  .  .  .  .  x  x

So no window cuts the prefix, however long, and what it takes from the last Meta Tokens is the beginning of the prefix: of the
image. Every released PaliGemma 2 has a window of 4096, which only prompts with images of 896 pixels exceed.

No token sees one behind it, but for the prefix, which is always whole: a part of the Meta Tokens has the same states as all.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from metaembed_jax.backbones.attention import attention
from metaembed_jax.backbones.layers import (
    MLP,
    GatedMLP,
    LayerNorm,
    Linear,
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
from metaembed_jax.backbones.paligemma.config import Config, TextConfig, VisionConfig
from metaembed_jax.batch.rows import Batch
from metaembed_jax.sharding import constrain


class VisionBlock(nnx.Module):
    """Pre-norm attention over the image and a feed-forward, all with biases."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, layers: int):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.norm1 = LayerNorm(width, epsilon=config.layer_norm_eps, rngs=rngs, layers=layers)
        self.norm2 = LayerNorm(width, epsilon=config.layer_norm_eps, rngs=rngs, layers=layers)
        self.query = Linear(width, width, axes=("embed", "heads"), bias=True, rngs=rngs, layers=layers)
        self.key = Linear(width, width, axes=("embed", "heads"), bias=True, rngs=rngs, layers=layers)
        self.value = Linear(width, width, axes=("embed", "heads"), bias=True, rngs=rngs, layers=layers)
        self.output = Linear(width, width, axes=("heads", "embed"), bias=True, rngs=rngs, layers=layers)
        self.mlp = MLP(width, config.intermediate_size, activation=jax.nn.gelu, rngs=rngs, layers=layers)

    def __call__(self, x_IND, _):
        normed = self.norm1(x_IND)
        query, key, value = (split_heads(project(normed), self.heads) for project in (self.query, self.key, self.value))
        image = jnp.ones(x_IND.shape[:2], jnp.int32)
        mixed = attention(query, key, value, image, image, causal=False)
        x_IND = x_IND + self.output(mixed.reshape(x_IND.shape))
        return constrain(x_IND + self.mlp(self.norm2(x_IND)), "batch", None, None)


class VisionTower(nnx.Module):
    """Patches of images, all of one size, to visual tokens of the language model's width."""

    def __init__(self, config: VisionConfig, width: int, *, rngs: nnx.Rngs):
        self.config = config
        inner = config.hidden_size
        self.patch_embedding = Linear(3 * config.patch_size**2, inner, axes=("patch", "embed"), bias=True, rngs=rngs)
        self.positions = param(rngs, jax.nn.initializers.normal(inner**-0.5), (config.patches, inner), (None, "embed"))
        self.blocks = VisionBlock(config, rngs=rngs, layers=config.num_hidden_layers)
        self.final_norm = LayerNorm(inner, epsilon=config.layer_norm_eps, rngs=rngs)
        self.projector = Linear(inner, width, axes=("embed", None), bias=True, rngs=rngs)

    def __call__(self, patches_BPX: UInt8[Array, "B P X"], *, dtype, checkpoint: bool, unroll: int) -> Float[Array, "B P D"]:
        """One visual token for each patch; the images of a row lie one behind the other."""
        B, P, X = patches_BPX.shape
        x_IND = self.embed_patches(patches_BPX.reshape(-1, self.config.patches, X), dtype)
        x_IND = scan_layers(self.blocks, x_IND, None, checkpoint=checkpoint, unroll=unroll)
        return constrain(self.projector(self.final_norm(x_IND)).reshape(B, P, -1), "batch", None, None)

    def embed_patches(self, patches_INX: UInt8[Array, "I N X"], dtype) -> Float[Array, "I N D"]:
        """uint8 pixels to normalised floats, then the patch kernel, and what is learned of each place."""
        x_IND = self.patch_embedding(normalised(patches_INX, self.config.image_mean, self.config.image_std).astype(dtype))
        return constrain(x_IND + self.positions[...].astype(dtype), "batch", None, None)


class Norm(nnx.Module):
    """Gemma's root-mean-square norm: float32 to the end, with a scale that is stored less one."""

    def __init__(self, width: int, *, epsilon: float, rngs: nnx.Rngs, layers: int | None = None):
        self.scale = param(rngs, jax.nn.initializers.zeros, (width,), (None,), layers)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        # An array of its own, as in RMSNorm.
        return jax.lax.optimization_barrier((x32 * (1 + self.scale[...])).astype(x.dtype))


class DecoderLayer(nnx.Module):
    """Pre-norm attention with grouped heads and a gated feed-forward, without biases; in Gemma 2 a norm follows each of them."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, layers: int):
        width, epsilon = config.hidden_size, config.rms_norm_eps
        self.config = config
        inner, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.input_norm = Norm(width, epsilon=epsilon, rngs=rngs, layers=layers)
        self.query = Linear(width, inner, axes=("embed", "heads"), bias=False, rngs=rngs, layers=layers)
        self.key = Linear(width, key_value, axes=("embed", "heads"), bias=False, rngs=rngs, layers=layers)
        self.value = Linear(width, key_value, axes=("embed", "heads"), bias=False, rngs=rngs, layers=layers)
        self.output = Linear(inner, width, axes=("heads", "embed"), bias=False, rngs=rngs, layers=layers)
        self.mlp = GatedMLP(width, config.intermediate_size, bias=False, activation=jax.nn.gelu, rngs=rngs, layers=layers)
        if config.is_gemma2:
            self.attention_post_norm = Norm(width, epsilon=epsilon, rngs=rngs, layers=layers)
            self.mlp_pre_norm = Norm(width, epsilon=epsilon, rngs=rngs, layers=layers)
            self.mlp_post_norm = Norm(width, epsilon=epsilon, rngs=rngs, layers=layers)
        else:
            self.mlp_norm = Norm(width, epsilon=epsilon, rngs=rngs, layers=layers)

    def __call__(self, x_BSD, local, segments_BS, is_meta_BS, cos_BSK, sin_BSK):
        config, normed = self.config, self.input_norm(x_BSD)
        query_BSHK = rotate(split_heads(self.query(normed), config.num_attention_heads), cos_BSK, sin_BSK)
        key_BSGK = rotate(split_heads(self.key(normed), config.num_key_value_heads), cos_BSK, sin_BSK)
        value_BSGK = split_heads(self.value(normed), config.num_key_value_heads)
        mixed = self.attend(query_BSHK, key_BSGK, value_BSGK, local, segments_BS, is_meta_BS)
        mixed = self.output(mixed.reshape(*x_BSD.shape[:2], -1))
        if config.is_gemma2:
            x_BSD = x_BSD + self.attention_post_norm(mixed)
            x_BSD = x_BSD + self.mlp_post_norm(self.mlp(self.mlp_pre_norm(x_BSD)))
        else:
            x_BSD = x_BSD + mixed
            x_BSD = x_BSD + self.mlp(self.mlp_norm(x_BSD))
        return constrain(x_BSD, "batch", None, None)

    def attend(self, query_BSHK, key_BSGK, value_BSGK, local, segments_BS, is_meta_BS):
        """Each prefix over itself; Meta Tokens over all of their item before them, or over a window of it."""
        config, arrays = self.config, (query_BSHK, key_BSGK, value_BSGK, segments_BS)
        second = dict(scale=config.query_pre_attn_scalar**-0.5, softcap=config.attn_logit_softcapping) if config.is_gemma2 else {}

        def causal(window):
            return lambda *arrays: attention(*arrays, causal=True, window=window, **second)

        if config.is_gemma2 and config.sliding_window < query_BSHK.shape[1]:
            meta_BSHK = jax.lax.cond(local, causal(config.sliding_window), causal(None), *arrays, segments_BS)
        else:
            meta_BSHK = causal(None)(*arrays, segments_BS)
        # As keys of the prefix, Meta Tokens are padding.
        prefix_BSHK = attention(*arrays, jnp.where(is_meta_BS, 0, segments_BS), causal=False, **second)
        return jnp.where(is_meta_BS[..., None, None], meta_BSHK, prefix_BSHK)


class Backbone(nnx.Module):
    """Vision tower and language model; it returns the last hidden states at the positions that a batch names."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        text = config.text_config
        self.vision = VisionTower(config.vision_config, text.hidden_size, rngs=rngs)
        self.embedding = param(rngs, jax.nn.initializers.normal(0.02), (text.vocab_size, text.hidden_size), ("vocabulary", "embed"))
        self.layers = DecoderLayer(text, rngs=rngs, layers=text.num_hidden_layers)
        self.final_norm = Norm(text.hidden_size, epsilon=text.rms_norm_eps, rngs=rngs)

    @property
    def width(self) -> int:
        """The hidden size D."""
        return self.config.width

    def __call__(
        self, batch: Batch, meta_RD: Float[Array, "R D"], *, dtype, checkpoint: bool, unroll: int
    ) -> Float[Array, "B V D"]:
        """Last-layer states, after the final norm, at `batch.reads`.

        Args:
          batch: patches of whole images.
          meta_RD: the table of Meta Tokens; its rows are scaled as those of the vocabulary are.
          dtype: of activations and matmuls.
          checkpoint, unroll: as in `scan_layers`.
        """
        how = {"checkpoint": checkpoint, "unroll": unroll}
        x_BSD = self.embed(batch, meta_RD, dtype)
        if batch.patches is not None:
            with jax.named_scope("vision"):
                visual_BPD = self.vision(batch.patches, dtype=dtype, **how)
            x_BSD = place_units(visual_BPD, batch.visual, x_BSD)
        context = batch.segments, batch.meta >= 0, *self.rotary(batch.positions[:, 0])
        local = jnp.arange(self.config.text_config.num_hidden_layers) % 2 == 0
        with jax.named_scope("language"):
            x_BSD = scan_layers(self.layers, constrain(x_BSD, "batch", None, None), local, *context, **how)
            return self.final_norm(at(x_BSD, batch.reads))

    def embed(self, batch: Batch, meta_RD: Float[Array, "R D"], dtype) -> Float[Array, "B S D"]:
        """Rows of both tables times the root of their width, which is rounded as they are: 45.25 for 2048 in bfloat16."""
        x_BSD = embed_tokens(self.embedding[...].astype(dtype), meta_RD.astype(dtype), batch)
        return x_BSD * jnp.asarray(self.width**0.5, dtype)

    def rotary(self, positions_BS: Int[Array, "B S"]) -> tuple[Float[Array, "B S K"], Float[Array, "B S K"]]:
        """Cosines and sines of each position's angles."""
        text = self.config.text_config
        angles = positions_BS[..., None].astype(jnp.float32) * inverse_frequencies(text.head_dim, text.rope_theta)
        angles = jnp.concatenate([angles, angles], axis=-1)
        return jnp.cos(angles), jnp.sin(angles)
