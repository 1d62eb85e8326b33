"""Base class of the backbones: a language model on tokens and visual tokens, whose last states are read at some positions.

B rows, A axes of positions, S tokens, V positions that are read, R Meta Tokens, U units (visual tokens), D width, K head width.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from metaembed_jax.backbones.config import FamilyConfig
from metaembed_jax.backbones.layers import (
    RMSNorm,
    at,
    cos_sin,
    embed_tokens,
    inverse_frequencies,
    param,
    place_units,
    scan_layers,
)
from metaembed_jax.batch.rows import Batch
from metaembed_jax.sharding import constrain


class Backbone(nnx.Module):
    """A vision tower and a language model. A call returns the last hidden states at the positions `batch.reads`.

    The subclass of a family sets the classes of its tower, layers and norm, and overrides the steps in which the family differs.
    """

    tower: ClassVar[type]  # (vision_config, width, *, rngs); called with (batch, *, dtype, checkpoint, unroll)
    layer: ClassVar[type]  # (text_config, *, rngs, layers); called with (x_BSD, flag, *context)
    norm: ClassVar[type] = RMSNorm  # (width, *, epsilon, rngs)

    def __init__(self, config: FamilyConfig, *, rngs: nnx.Rngs):
        self.config = config
        text = config.text_config
        self.vision = self.tower(config.vision_config, config.width, rngs=rngs)
        self.embedding = param(rngs, jax.nn.initializers.normal(0.02), (config.vocabulary, config.width), ("vocabulary", "embed"))
        self.layers = self.layer(text, rngs=rngs, layers=text.num_hidden_layers)
        self.final_norm = self.norm(config.width, epsilon=text.rms_norm_eps, rngs=rngs)

    @property
    def width(self) -> int:
        """The hidden size D."""
        return self.config.width

    def __call__(
        self, batch: Batch, meta_RD: Float[Array, "R D"], *, dtype, checkpoint: bool, unroll: int
    ) -> Float[Array, "B V D"]:
        """Return the last layer's states, after the final norm, at `batch.reads`.

        Args:
          batch: rows of the family's layout. Without patches, the tower does not run.
          meta_RD: the table of Meta Tokens.
          dtype: type of activations and matmuls.
          checkpoint, unroll: as in `scan_layers`.
        """
        loop = {"checkpoint": checkpoint, "unroll": unroll}
        x_BSD, tower_output = self.embed(batch, meta_RD, dtype), None
        if batch.patches is not None:
            with jax.named_scope("vision"):
                tower_output = self.vision(batch, dtype=dtype, **loop)
            x_BSD = self.insert(tower_output, batch.visual, x_BSD)
        context = self.context(batch, tower_output)
        with jax.named_scope("language"):
            x_BSD = constrain(x_BSD, "batch", None, None)
            return self.final_norm(self.run_layers(x_BSD, batch.reads, context, loop))

    def embed(self, batch: Batch, meta_RD: Float[Array, "R D"], dtype) -> Float[Array, "B S D"]:
        """Look up tokens and Meta Tokens."""
        return embed_tokens(self.embedding[...].astype(dtype), meta_RD.astype(dtype), batch)

    def insert(self, tower_output: Any, visual_BS: Int[Array, "B S"], x_BSD: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Insert the output of the tower, by default units [B, U, D], among the tokens."""
        return place_units(tower_output, visual_BS, x_BSD)

    def flags(self) -> Any:
        """Return arrays with a leading axis of layers, of which each layer gets its entry; None if layers need no flag."""
        return None

    def context(self, batch: Batch, tower_output: Any) -> tuple:
        """Return the arrays that all layers read: by default segments, cosines and sines.

        Args:
          tower_output: the tower's result; None if rows have no patches.
        """
        return batch.segments, *self.rotary(batch.positions)

    def run_layers(
        self, x_BSD: Float[Array, "B S D"], reads_BV: Int[Array, "B V"], context: tuple, loop: dict
    ) -> Float[Array, "B V D"]:
        """Run the layers, and return the states at the positions `reads_BV`."""
        return at(scan_layers(self.layers, x_BSD, self.flags(), *context, **loop), reads_BV)

    def rotary(self, positions_BAS: Int[Array, "B A S"]) -> tuple[Float[Array, "B S K"], Float[Array, "B S K"]]:
        """Return cosines and sines of the angles of each position."""
        return cos_sin(positions_BAS[:, 0][..., None].astype(jnp.float32) * self.frequencies())

    def frequencies(self) -> Float[Array, "K/2"]:
        """Return the angle of each frequency from one position to the next."""
        text = self.config.text_config
        return inverse_frequencies(text.head_width, text.rope_theta)
