"""The networks of the Qwen-VL families, without the layers of their towers and language models.

B rows, S tokens, V positions that are read, P patches, D width, K head width.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from metaembed_jax.backbones import backbone
from metaembed_jax.backbones.flop_counts import AttentionCount, FlopCount
from metaembed_jax.backbones.layers import cos_sin, cuts_last, inverse_frequencies, read_at
from metaembed_jax.backbones.qwen.config import QwenConfig, QwenTextConfig


class Backbone(backbone.Backbone):
    """A backbone with M-RoPE. Its last layer may be computed only at the positions that are read."""

    config: QwenConfig

    def flags(self) -> Any:
        """Return the number of each layer."""
        return np.arange(self.config.text_config.num_hidden_layers, dtype=np.int32)

    def run_layers(
        self, x_BSD: Float[Array, "B S D"], reads_BV: Int[Array, "B V"], context: tuple, loop: dict
    ) -> Float[Array, "B V D"]:
        """Run the layers, and return the states at the positions `reads_BV`."""
        return read_at(self.layers, x_BSD, self.flags(), *context, reads_BV=reads_BV, **loop)

    def rotary(self, positions_BAS: Int[Array, "B 3 S"]) -> tuple[Float[Array, "B S K"], Float[Array, "B S K"]]:
        """Return cosines and sines of M-RoPE."""
        axes = self.mrope_axes(self.config.text_config.mrope_section)
        angles_BSH = jnp.take(positions_BAS, axes, axis=1).swapaxes(1, 2).astype(jnp.float32)
        return cos_sin(angles_BSH * self.frequencies())

    @staticmethod
    def mrope_axes(sections: tuple[int, int, int]) -> Int[np.ndarray, "K/2"]:
        """Return the axis of each frequency: 0 for time, 1 for rows, 2 for columns. A family defines it."""
        raise NotImplementedError


def patch_angles(positions_BP2: Int[Array, "B P 2"], head_width: int) -> tuple[Float[Array, "B P K"], Float[Array, "B P K"]]:
    """Return cosines and sines for the tower: half of the angles are of the row of a patch, half of its column."""
    half = head_width // 2
    angles = positions_BP2[..., None].astype(jnp.float32) * inverse_frequencies(half, 10000.0)
    return cos_sin(angles.reshape(*positions_BP2.shape[:2], half))


def language_counts(config: QwenTextConfig, S: int, V: int) -> tuple[FlopCount, ...]:
    """Count the language model on a row of S tokens; V of them are read."""
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_width)
    cut = int(cuts_last(config.num_hidden_layers))
    attention = (AttentionCount(config.num_hidden_layers - cut, S, S, S, *heads),)
    layers = FlopCount("layers", S, config.hidden_size, attention, last="mlp.down", has_meta=True)
    if not cut:
        return (layers,)
    attention = (AttentionCount(1, V, S, S, *heads),)
    return layers, FlopCount(
        "layers", V, config.hidden_size, attention, other_positions={"key": S, "value": S}, scanned=False, has_meta=True
    )
