"""What the networks of the Qwen-VL families share: everything but the layers of their tower and their language model.

B rows, S tokens, V positions that are read, R Meta Tokens, P patches, X numbers in a patch, U units (merged 2x2 patches),
D width, K head width.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from metaembed_jax.backbones.layers import RMSNorm, embed_tokens, inverse_frequencies, param, place_units, read_at
from metaembed_jax.backbones.qwen.config import QwenConfig
from metaembed_jax.batch.rows import Batch
from metaembed_jax.sharding import constrain


class Backbone(nnx.Module):
    """Vision tower and language model; it returns the last hidden states at the positions that a batch names.

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
        self, batch: Batch, meta_RD: Float[Array, "R D"], *, dtype, checkpoint: bool, unroll: int
    ) -> Float[Array, "B V D"]:
        """Last-layer states, after the final norm, at `batch.reads`.

        Args:
          batch: positions on three axes; `patch_arrays` are the family's.
          meta_RD: the table of Meta Tokens.
          dtype: of activations and matmuls.
          checkpoint, unroll: as in `scan_layers`.
        """
        how = {"checkpoint": checkpoint, "unroll": unroll}
        x_BSD = embed_tokens(self.embedding[...].astype(dtype), meta_RD.astype(dtype), batch)
        context = (batch.segments, *self.rotary(batch.positions))
        if batch.patches is not None:
            with jax.named_scope("vision"):
                seen = self.vision(batch, dtype=dtype, **how)
            x_BSD, more = self.place(seen, batch.visual, x_BSD)
            context += more
        numbers = np.arange(self.config.text_config.num_hidden_layers, dtype=np.int32)
        with jax.named_scope("language"):
            x_BSD = constrain(x_BSD, "batch", None, None)
            return self.final_norm(read_at(self.layers, x_BSD, numbers, *context, reads_BV=batch.reads, **how))

    def place(self, seen, visual_BS: Int[Array, "B S"], x_BSD: Float[Array, "B S D"]) -> tuple[Float[Array, "B S D"], tuple]:
        """The states with what the tower saw in its places, and what layers are to read of it besides."""
        return place_units(seen, visual_BS, x_BSD), ()

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


def patch_angles(positions_BP2: Int[Array, "B P 2"], head_width: int) -> tuple[Float[Array, "B P K"], Float[Array, "B P K"]]:
    """Cosines and sines of the tower: half of the angles turn with the row of a patch, half with its column."""
    half = head_width // 2
    angles = positions_BP2[..., None].astype(jnp.float32) * inverse_frequencies(half, 10000.0)
    angles = angles.reshape(*positions_BP2.shape[:2], half)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)
