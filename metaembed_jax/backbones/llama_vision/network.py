"""Llama-3.2-Vision (arXiv 2407.21783). Correct is what transformers' `modeling_mllama.py` computes from the same checkpoint.

B rows, S tokens, V positions that are read, R Meta Tokens, T states of a row's images, D width, H heads, G key/value heads,
K head width, L layers.

An image is no part of the sequence. Some layers attend to it in place of the text, from every token of an item that has one:

    layer      0 1 2 3 4 5 6 7 8 9        . causal attention to the text
               . . . x . . . . x .        x attention to the image, behind gates; items without one pass the layer as they are
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from metaembed_jax.backbones.attention import attention
from metaembed_jax.backbones.layers import (
    GatedMLP,
    Linear,
    RMSNorm,
    at,
    embed_tokens,
    inverse_frequencies,
    param,
    rotate,
    scan_layers,
    split_heads,
)
from metaembed_jax.backbones.llama_vision.config import Config, TextConfig
from metaembed_jax.backbones.llama_vision.vision import VisionTower
from metaembed_jax.batch.rows import Batch
from metaembed_jax.sharding import constrain


class Crossing(nnx.Module):
    """What a cross-attention layer has beside a layer's own: norms of its heads, and gates."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, layers: int):
        head_width = config.hidden_size // config.num_attention_heads
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
        """One layer.

        Args:
          kind: whether it attends to the image, and the state of its `Crossing` (of any, if it does not).
          text: segments [B, S], cosines and sines [B, S, K].
          image: states [B, T, D], their segments [B, T], and which tokens have an image [B, S, 1]; None where rows have no patches.
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

    def run(self, x_BSD, attend, attention_gate, mlp_gate):
        normed_BSD = self.input_norm(x_BSD)
        mixed = attend(split_heads(self.query(normed_BSD), self.heads), normed_BSD)
        x_BSD = x_BSD + attention_gate * self.output(mixed.reshape(x_BSD.shape))
        return constrain(x_BSD + mlp_gate * self.mlp(self.mlp_norm(x_BSD)), "batch", None, None)

    def over_text(self, text):
        segments_BS, cos_BSK, sin_BSK = text

        def attend(query_BSHK, normed_BSD):
            query_BSHK, key_BSGK = (
                rotate(x, cos_BSK, sin_BSK) for x in (query_BSHK, split_heads(self.key(normed_BSD), self.key_value_heads))
            )
            value_BSGK = split_heads(self.value(normed_BSD), self.key_value_heads)
            return attention(query_BSHK, key_BSGK, value_BSGK, segments_BS, segments_BS, causal=True)

        return attend

    def over_image(self, text, image, crossing: Crossing):
        (segments_BS, *_), (states_BTD, segments_BT, _) = text, image

        def attend(query_BSHK, _):
            key_BTGK = crossing.key_norm(split_heads(self.key(states_BTD), self.key_value_heads))
            value_BTGK = split_heads(self.value(states_BTD), self.key_value_heads)
            return attention(crossing.query_norm(query_BSHK), key_BTGK, value_BTGK, segments_BS, segments_BT, causal=False)

        return attend


class Backbone(nnx.Module):
    """Vision tower and language model; it returns the last hidden states at the positions that a batch names."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        text = config.text_config
        self.vision = VisionTower(config.vision_config, text.hidden_size, rngs=rngs)
        self.embedding = param(rngs, jax.nn.initializers.normal(0.02), (config.vocabulary, config.width), ("vocabulary", "embed"))
        self.layers = DecoderLayer(text, rngs=rngs, layers=text.num_hidden_layers)
        self.crossing = Crossing(text, rngs=rngs, layers=len(text.cross_attention_layers))
        self.final_norm = RMSNorm(text.hidden_size, epsilon=text.rms_norm_eps, rngs=rngs)

    @property
    def width(self) -> int:
        """The hidden size D."""
        return self.config.width

    def __call__(
        self, batch: Batch, meta_RD: Float[Array, "R D"], *, dtype, checkpoint: bool, unroll: int
    ) -> Float[Array, "B V D"]:
        """Last-layer states, after the final norm, at `batch.reads`. Meta Tokens look at an item's image as its tokens do.

        Args:
          batch: `patch_arrays` are the family's.
          meta_RD: the table of Meta Tokens.
          dtype: of activations and matmuls.
          checkpoint, unroll: as in `scan_layers`.
        """
        how = {"checkpoint": checkpoint, "unroll": unroll}
        image = None
        if batch.patches is not None:
            with jax.named_scope("vision"):
                image = *self.vision(batch, dtype=dtype, **how), self.has_image(batch)
        x_BSD = embed_tokens(self.embedding[...].astype(dtype), meta_RD.astype(dtype), batch)
        text = (batch.segments, *self.rotary(batch.positions[:, 0]))
        kinds, graph = self.kinds()
        with jax.named_scope("language"):
            x_BSD = scan_layers(self.layers, x_BSD, kinds, graph, text, image, **how)
            return self.final_norm(at(x_BSD, batch.reads))

    def has_image(self, batch: Batch) -> Bool[Array, "B S 1"]:
        """Mark the tokens whose item has an image, [B, S, 1]. Every image begins with a patch that is no padding."""
        of_images = batch.patch_segments[:, None, :: self.config.vision_config.image_patches]
        segments_BS1 = batch.segments[..., None]
        return ((segments_BS1 == of_images) & (segments_BS1 > 0)).any(axis=-1, keepdims=True)

    def kinds(self):
        """What `DecoderLayer` is told of each layer, stacked, and the graph of the states therein."""
        crossings, layers = self.config.text_config.cross_attention_layers, np.arange(self.config.text_config.num_hidden_layers)
        graph, state = nnx.split(self.crossing)
        nearest_L = np.minimum(np.searchsorted(crossings, layers), len(crossings) - 1)
        return (np.isin(layers, crossings), jax.tree.map(lambda x: x[nearest_L], state)), graph

    def rotary(self, positions_BS: Int[Array, "B S"]) -> tuple[Float[Array, "B S K"], Float[Array, "B S K"]]:
        """Cosines and sines; slow frequencies are scaled for long texts ("llama3")."""
        text = self.config.text_config
        frequencies = inverse_frequencies(text.hidden_size // text.num_attention_heads, text.rope_theta)
        turns = text.original_max_position_embeddings * frequencies / (2 * np.pi)
        kept = jnp.clip((turns - text.low_freq_factor) / (text.high_freq_factor - text.low_freq_factor), 0.0, 1.0)
        frequencies = (1 - kept) * frequencies / text.factor + kept * frequencies
        angles = positions_BS[..., None].astype(jnp.float32) * frequencies
        angles = jnp.concatenate([angles, angles], axis=-1)
        return jnp.cos(angles), jnp.sin(angles)
