"""What the networks of the Qwen-VL families share: everything but the layers of their tower and their language model.

B batch, S tokens (with the appended rows), R appended rows, P patches, X numbers in a patch, U units (merged 2x2 patches),
D width, K head width.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from metaembed_jax.backbones.layers import RMSNorm, inverse_frequencies, param, place_units, read_last
from metaembed_jax.backbones.qwen.config import QwenConfig
from metaembed_jax.sharding import constrain


class Backbone(nnx.Module):
    """Vision tower and language model; what it returns are the last hidden states of the rows appended to each prompt.

    A family sets `tower` and `layer`, and says by `mrope_axes` which of its frequencies turn with what.
    """

    tower: ClassVar[type[nnx.Module]]  # (vision_config, *, rngs)
    layer: ClassVar[type[nnx.Module]]  # (text_config, *, rngs, layers)

    def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs):
        self.config = config
        text = config.text_config
        self.vision = self.tower(config.vision_config, rngs=rngs)
        self.embedding = param(rngs, jax.nn.initializers.normal(0.02), (text.vocab_size, text.hidden_size), ("vocabulary", "embed"))
        self.layers = self.layer(text, rngs=rngs, layers=text.num_hidden_layers)
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
        how = {"checkpoint": checkpoint, "unroll": unroll}
        x_BSD = jnp.take(self.embedding[...].astype(dtype), batch["tokens"], axis=0)
        R, suffix_BRD = len(suffix_RD), jnp.broadcast_to(suffix_RD.astype(dtype), (len(x_BSD), *suffix_RD.shape))
        x_BSD = jnp.concatenate([constrain(x_BSD, "batch", None, None), suffix_BRD], axis=1)
        mask_BS = jnp.pad(batch["mask"], ((0, 0), (0, R)), constant_values=True)
        context = (mask_BS, *self.rotary(extend_positions(batch["positions"], R)))
        if "patches" in batch:
            index_BS = jnp.pad(batch["visual_index"], ((0, 0), (0, R)), constant_values=-1)
            with jax.named_scope("vision"):
                seen = self.vision(*(batch[name] for name in ("patches", "patch_positions", "patch_mask")), dtype=dtype, **how)
            x_BSD, more = self.place(seen, index_BS, x_BSD)
            context += more
        numbers = np.arange(self.config.text_config.num_hidden_layers, dtype=np.int32)
        with jax.named_scope("language"):
            x_BSD = constrain(x_BSD, "batch", None, None)
            return self.final_norm(read_last(self.layers, x_BSD, numbers, *context, keep=keep, **how))

    def place(self, seen, index_BS: Int[Array, "B S"], x_BSD: Float[Array, "B S D"]) -> tuple[Float[Array, "B S D"], tuple]:
        """The states with what the tower saw in its places, and what layers are to read of it besides."""
        return place_units(seen, index_BS, x_BSD), ()

    @staticmethod
    def mrope_axes(sections: tuple[int, int, int]) -> Int[np.ndarray, "K/2"]:
        """Which of time, row and column each frequency turns with, 0 to 2."""
        raise NotImplementedError

    def rotary(self, positions_B3S: Int[Array, "B 3 S"]) -> tuple[Float[Array, "B S K"], Float[Array, "B S K"]]:
        """Cosines and sines of M-RoPE."""
        text = self.config.text_config
        axes = self.mrope_axes(text.mrope_section)
        angles = jnp.take(positions_B3S, axes, axis=1).swapaxes(1, 2).astype(jnp.float32)
        angles = angles * inverse_frequencies(text.head_dim, text.rope_theta)
        angles = jnp.concatenate([angles, angles], axis=-1)
        return jnp.cos(angles), jnp.sin(angles)


def extend_positions(positions_B3S: Int[Array, "B 3 S"], rows: int) -> Int[Array, "B 3 S+rows"]:
    """Appended rows count on as text: one past the largest position of the prompt, alike on all three axes."""
    start_B11 = positions_B3S.max(axis=(1, 2), keepdims=True) + 1
    suffix = jnp.broadcast_to(start_B11 + jnp.arange(rows), (positions_B3S.shape[0], 3, rows))
    return jnp.concatenate([positions_B3S, suffix], axis=-1)


def patch_angles(positions_BP2: Int[Array, "B P 2"], head_width: int) -> tuple[Float[Array, "B P K"], Float[Array, "B P K"]]:
    """Cosines and sines of the tower: half of the angles turn with the row of a patch, half with its column."""
    half = head_width // 2
    angles = positions_BP2[..., None].astype(jnp.float32) * inverse_frequencies(half, 10000.0)
    angles = angles.reshape(*positions_BP2.shape[:2], half)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)
