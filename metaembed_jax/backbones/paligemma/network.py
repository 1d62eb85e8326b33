"""PaliGemma 1 and 2 (arXiv 2407.07726, 2412.03555): SigLIP's vision tower before Gemma or Gemma 2.

Correct is what transformers' `modeling_paligemma.py` computes from the same checkpoint.

B batch, P patches, S prompt tokens, R appended rows, T = S + R, D width, H heads, G key/value heads, K head width, L layers,
X numbers in a patch.

Image and prompt are a prefix, whose tokens see each other in both directions; the appended rows see the prefix and, causally,
themselves. Prompts are padded on the left, so the prefix ends at the same place in every row. For S = 4 with one token of padding,
and R = 3; a local layer with a window of 5 lacks what is marked `o`:

                 .  i  p  p  m  m  m
    padding      .  x  x  x  .  .  .       read by nobody
    image        .  x  x  x  .  .  .
    prompt       .  x  x  x  .  .  .
    prompt       .  x  x  x  .  .  .
    Meta Token   .  x  x  x  x  .  .
    Meta Token   .  x  x  x  x  x  .
    Meta Token   .  o  x  x  x  x  x

So no window cuts the prefix, however long, and what it takes from the last rows is the beginning of the prefix: of the image. Every
released PaliGemma 2 has a window of 4096, which only prompts with images of 896 pixels exceed.

No row sees one behind it, but for the prefix, which is always whole: a part of the appended rows computes the same states as all.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from metaembed_jax.backbones.attention import attention
from metaembed_jax.backbones.layers import (
    MLP,
    GatedMLP,
    LayerNorm,
    Linear,
    inverse_frequencies,
    normalised,
    param,
    place_units,
    rotate,
    scan_layers,
    split_heads,
)
from metaembed_jax.backbones.paligemma.config import Config, TextConfig, VisionConfig
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

    def __call__(self, x_BPD, _):
        normed = self.norm1(x_BPD)
        query, key, value = (split_heads(project(normed), self.heads) for project in (self.query, self.key, self.value))
        mixed = attention(query, key, value, jnp.ones(x_BPD.shape[:2], bool), causal=False)
        x_BPD = x_BPD + self.output(mixed.reshape(x_BPD.shape))
        return constrain(x_BPD + self.mlp(self.norm2(x_BPD)), "batch", None, None)


class VisionTower(nnx.Module):
    """Patches of one image per row, all of one size, to visual tokens of the language model's width."""

    def __init__(self, config: VisionConfig, width: int, *, rngs: nnx.Rngs):
        self.config = config
        inner = config.hidden_size
        self.patch_embedding = Linear(3 * config.patch_size**2, inner, axes=("patch", "embed"), bias=True, rngs=rngs)
        self.positions = param(rngs, jax.nn.initializers.normal(inner**-0.5), (config.patches, inner), (None, "embed"))
        self.blocks = VisionBlock(config, rngs=rngs, layers=config.num_hidden_layers)
        self.final_norm = LayerNorm(inner, epsilon=config.layer_norm_eps, rngs=rngs)
        self.projector = Linear(inner, width, axes=("embed", None), bias=True, rngs=rngs)

    def __call__(self, patches_BPX: UInt8[Array, "B P X"], *, dtype, checkpoint: bool, unroll: int) -> Float[Array, "B P D"]:
        """One visual token for each patch."""
        x_BPD = self.embed_patches(patches_BPX, dtype)
        x_BPD = scan_layers(self.blocks, x_BPD, None, checkpoint=checkpoint, unroll=unroll)
        return constrain(self.projector(self.final_norm(x_BPD)), "batch", None, None)

    def embed_patches(self, patches_BPX: UInt8[Array, "B P X"], dtype) -> Float[Array, "B P D"]:
        """uint8 pixels to normalised floats, then the patch kernel, and what is learned of each place."""
        x_BPD = self.patch_embedding(normalised(patches_BPX, self.config.image_mean, self.config.image_std).astype(dtype))
        return constrain(x_BPD + self.positions[...].astype(dtype), "batch", None, None)


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

    def __call__(self, x_BTD, local, mask_BT, cos_BTK, sin_BTK, rows):
        config, normed = self.config, self.input_norm(x_BTD)
        query_BTHK = rotate(split_heads(self.query(normed), config.num_attention_heads), cos_BTK, sin_BTK)
        key_BTGK = rotate(split_heads(self.key(normed), config.num_key_value_heads), cos_BTK, sin_BTK)
        value_BTGK = split_heads(self.value(normed), config.num_key_value_heads)
        mixed = self.attend(query_BTHK, key_BTGK, value_BTGK, mask_BT, local, rows)
        mixed = self.output(mixed.reshape(*x_BTD.shape[:2], -1))
        if config.is_gemma2:
            x_BTD = x_BTD + self.attention_post_norm(mixed)
            x_BTD = x_BTD + self.mlp_post_norm(self.mlp(self.mlp_pre_norm(x_BTD)))
        else:
            x_BTD = x_BTD + mixed
            x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return constrain(x_BTD, "batch", None, None)

    def attend(self, query_BTHK, key_BTGK, value_BTGK, mask_BT, local, rows):
        """The prefix over itself; the last `rows` over all there is, or over a window of it."""
        config, prefix = self.config, query_BTHK.shape[1] - rows
        second = dict(scale=config.query_pre_attn_scalar**-0.5, softcap=config.attn_logit_softcapping) if config.is_gemma2 else {}

        def causal(window):
            def over(query_BRHK, *keys):
                return attention(query_BRHK, *keys, causal=True, window=window, **second)

            return over

        before = (x[:, :prefix] for x in (query_BTHK, key_BTGK, value_BTGK, mask_BT))
        appended = query_BTHK[:, prefix:], key_BTGK, value_BTGK, mask_BT
        if config.is_gemma2 and config.sliding_window < query_BTHK.shape[1]:
            mixed_BRHK = jax.lax.cond(local, causal(config.sliding_window), causal(None), *appended)
        else:
            mixed_BRHK = causal(None)(*appended)
        return jnp.concatenate([attention(*before, causal=False, **second), mixed_BRHK], axis=1)


class Backbone(nnx.Module):
    """Vision tower and language model; what it returns are the last hidden states of the rows appended to each prompt."""

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
        self, batch: dict[str, Array], suffix_RD: Float[Array, "R D"], *, keep: int, dtype, checkpoint: bool, unroll: int
    ) -> Float[Array, "B keep D"]:
        """Last-layer states, after the final norm, of the last `keep` of the rows `suffix_RD` appended to every prompt.

        Args:
          batch: `tokens` [B, S], `mask` [B, S], `visual_index` [B, S], left-padded; with images also `patches` [B, P, X] uint8.
          suffix_RD: rows that stand in the embedding table's place after the prompt; they are scaled as its rows are.
          dtype: of activations and matmuls.
          checkpoint, unroll: as in `scan_layers`.
        """
        rows = suffix_RD.shape[0]
        x_BSD = self.embed(batch, dtype, checkpoint, unroll)
        suffix_BRD = jnp.broadcast_to(self.scaled(suffix_RD, dtype), (x_BSD.shape[0], *suffix_RD.shape))
        x_BTD = constrain(jnp.concatenate([x_BSD, suffix_BRD], axis=1), "batch", None, None)
        mask_BT = jnp.pad(batch["mask"], ((0, 0), (0, rows)), constant_values=True)
        context = mask_BT, *self.rotary(positions(mask_BT)), rows
        local = jnp.arange(self.config.text_config.num_hidden_layers) % 2 == 0
        with jax.named_scope("language"):
            x_BTD = scan_layers(self.layers, x_BTD, local, *context, checkpoint=checkpoint, unroll=unroll)
            return self.final_norm(x_BTD[:, -keep:])

    def embed(self, batch: dict[str, Array], dtype, checkpoint: bool, unroll: int) -> Float[Array, "B S D"]:
        """Rows of the vocabulary, scaled, with visual tokens, not scaled, where `visual_index` points at one."""
        x_BSD = self.scaled(jnp.take(self.embedding[...].astype(dtype), batch["tokens"], axis=0), dtype)
        if "patches" not in batch:
            return x_BSD
        with jax.named_scope("vision"):
            patches_BPX = batch["patches"][:, : self.config.vision_config.patches]
            visual_BPD = self.vision(patches_BPX, dtype=dtype, checkpoint=checkpoint, unroll=unroll)
        return place_units(visual_BPD, batch["visual_index"], x_BSD)

    def scaled(self, rows: Float[Array, "... D"], dtype) -> Float[Array, "... D"]:
        """Rows of the vocabulary times the root of their width, which is rounded as they are: 45.25 for 2048 in bfloat16."""
        return rows.astype(dtype) * jnp.asarray(self.width**0.5, dtype)

    def rotary(self, positions_BT: Int[Array, "B T"]) -> tuple[Float[Array, "B T K"], Float[Array, "B T K"]]:
        """Cosines and sines of each position's angles."""
        text = self.config.text_config
        angles = positions_BT[..., None].astype(jnp.float32) * inverse_frequencies(text.head_dim, text.rope_theta)
        angles = jnp.concatenate([angles, angles], axis=-1)
        return jnp.cos(angles), jnp.sin(angles)


def positions(mask_BT: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """They count from 1, and padding, which is on the left, has 0. Only their distances reach the states."""
    return jnp.cumsum(mask_BT, axis=1, dtype=jnp.int32)
