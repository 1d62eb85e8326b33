"""Llama-3.2-Vision (arXiv 2407.21783), as transformers' `modeling_mllama.py` computes it from the same checkpoint.

B rows, S tokens, T states of a row's images, D width, H heads, G key/value heads, K head width, L layers.

Images have no tokens in the sequence. In some layers every token attends to the image of its item in place of the text:

    layer      0 1 2 3 4 5 6 7 8 9        . causal attention to the text
               . . . x . . . . x .        x attention to the image, behind gates; items without one skip the layer
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from metaembed_jax.backbones import backbone
from metaembed_jax.backbones.attention import attention
from metaembed_jax.backbones.flop_counts import AttentionCount, FlopCount
from metaembed_jax.backbones.layers import GatedMLP, Linear, RMSNorm, param, rotate, split_heads
from metaembed_jax.backbones.llama_vision.config import Config, TextConfig
from metaembed_jax.backbones.llama_vision.vision import VisionTower, vision_counts
from metaembed_jax.batch.items import Size
from metaembed_jax.batch.rows import Batch
from metaembed_jax.sharding import constrain


class Crossing(nnx.Module):
    """The parameters that only cross-attention layers have: norms of heads, and gates."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, layers: int):
        head_width = config.head_width
        self.query_norm = RMSNorm(head_width, epsilon=config.rms_norm_eps, rngs=rngs, layers=layers)
        self.key_norm = RMSNorm(head_width, epsilon=config.rms_norm_eps, rngs=rngs, layers=layers)
        self.attention_gate = param(rngs, jax.nn.initializers.ones, (1,), (None,), layers)
        self.mlp_gate = param(rngs, jax.nn.initializers.ones, (1,), (None,), layers)


class DecoderLayer(nnx.Module):
    """Pre-norm attention with grouped heads, to the text or to an image, and a gated feed-forward; no biases."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, layers: int):
        width = config.hidden_size
        self.heads, self.key_value_heads = config.num_attention_heads, config.num_key_value_heads
        key_value_width = self.key_value_heads * width // self.heads
        self.input_norm = RMSNorm(width, epsilon=config.rms_norm_eps, rngs=rngs, layers=layers)
        self.mlp_norm = RMSNorm(width, epsilon=config.rms_norm_eps, rngs=rngs, layers=layers)
        self.query = Linear(width, width, axes=("embed", "heads"), bias=False, rngs=rngs, layers=layers)
        self.key = Linear(width, key_value_width, axes=("embed", "heads"), bias=False, rngs=rngs, layers=layers)
        self.value = Linear(width, key_value_width, axes=("embed", "heads"), bias=False, rngs=rngs, layers=layers)
        self.output = Linear(width, width, axes=("heads", "embed"), bias=False, rngs=rngs, layers=layers)
        self.mlp = GatedMLP(width, config.intermediate_size, bias=False, rngs=rngs, layers=layers)

    def __call__(self, x_BSD, kind, crossing_graph, text, image):
        """Run one layer.

        Args:
          kind: True if the layer attends to the image, and the state of its `Crossing` (of any, if it does not).
          text: segments [B, S], cosines and sines [B, S, K].
          image: states [B, T, D], their segments [B, T], and the tokens that have an image [B, S, 1]; None: no row has patches.
        """
        is_crossing, state = kind
        if image is None:
            return jax.lax.cond(is_crossing, lambda x: x, lambda x: self.run(x, self.over_text(text), 1.0, 1.0), x_BSD)
        crossing, has_image_BS1 = nnx.merge(crossing_graph, state), image[2]
        gates = [
            jnp.where(is_crossing, jnp.tanh(gate[...]) * has_image_BS1, 1.0).astype(x_BSD.dtype)
            for gate in (crossing.attention_gate, crossing.mlp_gate)
        ]
        over_text, over_image = self.over_text(text), self.over_image(text, image, crossing)

        def attend(query_BSHK, normed_BSD):
            return jax.lax.cond(is_crossing, over_image, over_text, query_BSHK, normed_BSD)

        return self.run(x_BSD, attend, *gates)

    def run(self, x_BSD, attend: Callable, attention_gate, mlp_gate):
        """Run the layer with this attention: (query_BSHK, normed_BSD) -> [B, S, H, K]."""
        normed_BSD = self.input_norm(x_BSD)
        mixed = attend(split_heads(self.query(normed_BSD), self.heads), normed_BSD)
        x_BSD = x_BSD + attention_gate * self.output(mixed.reshape(x_BSD.shape))
        return constrain(x_BSD + mlp_gate * self.mlp(self.mlp_norm(x_BSD)), "batch", None, None)

    def over_text(self, text) -> Callable:
        """Return causal attention to the text, for `run`."""
        segments_BS, cos_BSK, sin_BSK = text

        def attend(query_BSHK, normed_BSD):
            query_BSHK, key_BSGK = (
                rotate(x, cos_BSK, sin_BSK) for x in (query_BSHK, split_heads(self.key(normed_BSD), self.key_value_heads))
            )
            value_BSGK = split_heads(self.value(normed_BSD), self.key_value_heads)
            return attention(query_BSHK, key_BSGK, value_BSGK, segments_BS, causal=True)

        return attend

    def over_image(self, text, image, crossing: Crossing) -> Callable:
        """Return attention to the image, for `run`."""
        (segments_BS, *_), (states_BTD, segments_BT, _) = text, image

        def attend(query_BSHK, _):
            key_BTGK = crossing.key_norm(split_heads(self.key(states_BTD), self.key_value_heads))
            value_BTGK = split_heads(self.value(states_BTD), self.key_value_heads)
            query_BSHK = crossing.query_norm(query_BSHK)
            return attention(query_BSHK, key_BTGK, value_BTGK, segments_BT, query_segments_BS=segments_BS, causal=False)

        return attend


class Backbone(backbone.Backbone):
    """Vision tower, and a language model whose cross-attention reads it. Meta Tokens attend to images as text tokens do."""

    tower, layer = VisionTower, DecoderLayer
    config: Config

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.crossing = Crossing(config.text_config, rngs=rngs, layers=len(config.text_config.cross_attention_layers))

    def insert(self, tower_output: Any, visual_BS: Int[Array, "B S"], x_BSD: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Return the states as they are: images have no tokens in the sequence."""
        return x_BSD

    def flags(self) -> Any:
        """Return for each layer whether it attends to images, and the state of a `Crossing`, which is its own if it does."""
        crossings, layers = self.config.text_config.cross_attention_layers, np.arange(self.config.text_config.num_hidden_layers)
        nearest_L = np.minimum(np.searchsorted(crossings, layers), len(crossings) - 1)
        return np.isin(layers, crossings), jax.tree.map(lambda x: x[nearest_L], nnx.split(self.crossing)[1])

    def context(self, batch: Batch, tower_output: Any) -> tuple:
        """Return the graph of a `Crossing`, and the arguments `text` and `image` of `DecoderLayer`."""
        text = batch.segments, *self.rotary(batch.positions)
        image = None if tower_output is None else (*tower_output, self.has_image(batch))
        return nnx.split(self.crossing)[0], text, image

    def has_image(self, batch: Batch) -> Bool[Array, "B S 1"]:
        """Mark the tokens whose item has an image, [B, S, 1]. The first patch of every image is not padding."""
        assert batch.patch_segments is not None  # a row without patches does not come here
        of_images = batch.patch_segments[:, None, :: self.config.vision_config.image_patches]
        segments_BS1 = batch.segments[..., None]
        return ((segments_BS1 == of_images) & (segments_BS1 > 0)).any(axis=-1, keepdims=True)

    def frequencies(self) -> Float[Array, "K/2"]:
        """Return the angles between neighbouring positions; low frequencies are scaled for long texts ("llama3")."""
        text, frequencies = self.config.text_config, super().frequencies()
        turns = text.original_max_position_embeddings * frequencies / (2 * np.pi)
        kept = jnp.clip((turns - text.low_freq_factor) / (text.high_freq_factor - text.low_freq_factor), 0.0, 1.0)
        return (1 - kept) * frequencies / text.factor + kept * frequencies


def flop_counts(config: Config, row: Size) -> tuple[FlopCount, ...]:
    """Count the network on a row; see `backbones.flop_counts`."""
    vision = config.vision_config
    T = row.patches // vision.tile_patches * (vision.tile_patches + 1)
    return (*(vision_counts(vision, row.patches, T) if row.patches else ()), *language_counts(config.text_config, row.tokens, T))


def language_counts(config: TextConfig, S: int, T: int) -> tuple[FlopCount, ...]:
    """Count the language model on a row of S tokens, whose images have T states."""
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_width)
    crossings = len(config.cross_attention_layers)
    over_text = FlopCount(
        "layers",
        S,
        config.hidden_size,
        (AttentionCount(config.num_hidden_layers - crossings, S, S, S, *heads),),
        last="mlp.down",
        gate="crossing.mlp_gate" if T else "",
        has_meta=True,
    )
    if not T:
        return (over_text,)
    over_image = over_text._replace(
        attention=(AttentionCount(crossings, S, T, T, *heads, rotates=False),),
        other_positions={"key": T, "value": T},
        memory=("key", "value"),
    )
    return (over_text, over_image)
