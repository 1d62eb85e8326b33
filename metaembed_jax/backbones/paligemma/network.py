"""PaliGemma 1 and 2 (arXiv 2407.07726, 2412.03555): SigLIP's vision tower before Gemma or Gemma 2.

The network computes the same as transformers' `modeling_paligemma.py` with the same checkpoint.

B rows, S tokens, R Meta Tokens, I images of all rows, N patches of an image, D width, H heads, G key/value heads, K head width,
L layers.

Image and prompt of an item are a prefix, whose tokens see each other in both directions. The Meta Tokens see the prefix and,
causally, themselves. Below are an item of 3 tokens and 3 Meta Tokens, and the first tokens of the next item in the row; `o` is
outside the window of 5 of a local layer:

                 i  p  p  m  m  m  p  p
    image        x  x  x  .  .  .  .  .
    prompt       x  x  x  .  .  .  .  .
    prompt       x  x  x  .  .  .  .  .
    Meta Token   x  x  x  x  .  .  .  .
    Meta Token   x  x  x  x  x  .  .  .
    Meta Token   o  x  x  x  x  x  .  .
    prompt       .  .  .  .  .  .  x  x

Windows do not apply inside the prefix. They hide the first tokens of the prefix, which are the image's, from the last Meta Tokens.
Every released PaliGemma 2 has a window of 4096, which only prompts with images of 896 pixels exceed.

No token sees a later one, except in the prefix, which is always whole. So the first Meta Tokens have the same states without the
later ones.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from metaembed_jax.backbones import backbone, siglip
from metaembed_jax.backbones.attention import attention
from metaembed_jax.backbones.flop_counts import AttentionCount, FlopCount
from metaembed_jax.backbones.layers import GatedMLP, Linear, param, rotate, split_heads
from metaembed_jax.backbones.paligemma.config import Config, TextConfig
from metaembed_jax.backbones.siglip import SiglipConfig, SiglipTower
from metaembed_jax.batch.items import Size
from metaembed_jax.batch.rows import Batch
from metaembed_jax.sharding import constrain


class VisionTower(SiglipTower):
    """SigLIP's tower, and a projector to one visual token for each patch."""

    def __init__(self, config: SiglipConfig, width: int, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.projector = Linear(config.hidden_size, width, axes=("embed", None), bias=True, rngs=rngs)

    def project(self, x_IND: Float[Array, "I N D"]) -> Float[Array, "I N width"]:
        """Make a visual token from the states of each patch."""
        return self.projector(x_IND)


class Norm(nnx.Module):
    """Gemma's root-mean-square norm, all in float32; the factor is 1 + scale."""

    def __init__(self, width: int, *, epsilon: float, rngs: nnx.Rngs, layers: int | None = None):
        self.scale = param(rngs, jax.nn.initializers.zeros, (width,), (None,), layers)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        # The barrier makes it a separate array, as in RMSNorm.
        return jax.lax.optimization_barrier((x32 * (1 + self.scale[...])).astype(x.dtype))


class DecoderLayer(nnx.Module):
    """Pre-norm attention with grouped heads and a gated feed-forward, without biases; in Gemma 2 a norm follows each of them."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, layers: int):
        width, epsilon = config.hidden_size, config.rms_norm_eps
        self.config = config
        inner, key_value = config.num_attention_heads * config.head_width, config.num_key_value_heads * config.head_width
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

    def __call__(self, x_BSD, is_local, segments_BS, is_meta_BS, cos_BSK, sin_BSK):
        config, normed = self.config, self.input_norm(x_BSD)
        query_BSHK = rotate(split_heads(self.query(normed), config.num_attention_heads), cos_BSK, sin_BSK)
        key_BSGK = rotate(split_heads(self.key(normed), config.num_key_value_heads), cos_BSK, sin_BSK)
        value_BSGK = split_heads(self.value(normed), config.num_key_value_heads)
        mixed = self.attend(query_BSHK, key_BSGK, value_BSGK, is_local, segments_BS, is_meta_BS)
        mixed = self.output(mixed.reshape(*x_BSD.shape[:2], -1))
        if config.is_gemma2:
            x_BSD = x_BSD + self.attention_post_norm(mixed)
            x_BSD = x_BSD + self.mlp_post_norm(self.mlp(self.mlp_pre_norm(x_BSD)))
        else:
            x_BSD = x_BSD + mixed
            x_BSD = x_BSD + self.mlp(self.mlp_norm(x_BSD))
        return constrain(x_BSD, "batch", None, None)

    def attend(self, query_BSHK, key_BSGK, value_BSGK, is_local, segments_BS, is_meta_BS):
        """Attend from each prefix to itself, and from Meta Tokens to all earlier tokens of their item, or to a window of them."""
        config, arrays = self.config, (query_BSHK, key_BSGK, value_BSGK)
        gemma2 = dict(scale=config.query_pre_attn_scalar**-0.5, softcap=config.attn_logit_softcapping) if config.is_gemma2 else {}

        def causal(window):
            return lambda *arrays: attention(*arrays, causal=True, window=window, **gemma2)

        if config.is_gemma2 and config.sliding_window < query_BSHK.shape[1]:
            meta_BSHK = jax.lax.cond(is_local, causal(config.sliding_window), causal(None), *arrays, segments_BS)
        else:
            meta_BSHK = causal(None)(*arrays, segments_BS)
        # For the prefix, Meta Tokens are padding.
        prefix_BSHK = attention(*arrays, jnp.where(is_meta_BS, 0, segments_BS), causal=False, **gemma2)
        return jnp.where(is_meta_BS[..., None, None], meta_BSHK, prefix_BSHK)


class Backbone(backbone.Backbone):
    """SigLIP's tower before Gemma or Gemma 2."""

    tower, layer, norm = VisionTower, DecoderLayer, Norm

    def embed(self, batch: Batch, meta_RD: Float[Array, "R D"], dtype) -> Float[Array, "B S D"]:
        """Look up tokens and Meta Tokens, scaled by the root of the width, rounded to the dtype: 45.25 for 2048 in bfloat16."""
        return super().embed(batch, meta_RD, dtype) * jnp.asarray(self.width**0.5, dtype)

    def flags(self) -> Bool[Array, "L"]:
        """Return True for each layer that is local in Gemma 2."""
        return jnp.arange(self.config.text_config.num_hidden_layers) % 2 == 0

    def context(self, batch: Batch, tower_output: Any) -> tuple:
        """Return segments, the positions of Meta Tokens, cosines and sines."""
        return batch.segments, batch.meta >= 0, *self.rotary(batch.positions)


def flop_counts(config: Config, row: Size) -> tuple[FlopCount, ...]:
    """Count the network on a row; see `backbones.flop_counts`."""
    vision = siglip.flop_counts(config.vision_config, row.patches, row.patches) if row.patches else ()
    return (*vision, language_count(config.text_config, row.tokens))


def language_count(config: TextConfig, S: int) -> FlopCount:
    """Count the language model on a row of S tokens."""
    heads, layers = (config.num_attention_heads, config.num_key_value_heads, config.head_width), config.num_hidden_layers
    attention = AttentionCount(layers, S, S, 2 * S, *heads)  # of prompts and of Meta Tokens, each over all positions
    last = "" if config.is_gemma2 else "mlp.down"  # in Gemma 2, a norm reads the output of mlp.down
    return FlopCount("layers", S, config.hidden_size, (attention,), last=last, has_meta=True)
