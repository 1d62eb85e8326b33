"""The network of MetaEmbed: a backbone with Meta Tokens at the end of its input, whose last states are a nested set of vectors.

B batch, S prompt tokens, R vectors of one item, D width of a vector, M width of the backbone.

    query      [left padding, prompt, q_1 .. q_16]                 -> the states at q_1 .. q_16
    candidate  [left padding, prompt, q_1 .. q_16, c_1 .. c_64]    -> the states at c_1 .. c_64

Attention is causal, so rows after the last one that is read change nothing: queries run without the candidate rows, and a
budget of r vectors runs only the rows up to the r-th.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from metaembed_jax.backbones import family
from metaembed_jax.backbones.layers import Linear, param

SIDES = ("query", "candidate")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the network.

    Attributes:
      backbone: name of the family.
      architecture: the family's `Config`.
      query_tokens, candidate_tokens: numbers of Meta Tokens, and so of vectors, of each side.
      meta_token_scale: standard deviation of fresh Meta Tokens.
      embedding_dim: width of the linear head; 0 for none (vectors have the backbone's width).
      dtype: of activations and matmuls, "float32" or "bfloat16".
      checkpoint: recompute each layer in the backward pass, to keep only its input.
      unroll: layers to a turn of the loop over a stack; more than 1 compiles longer and can run faster on CPU.
    """

    backbone: str
    architecture: object
    query_tokens: int = 16
    candidate_tokens: int = 64
    meta_token_scale: float = 0.02
    embedding_dim: int = 0
    dtype: str = "bfloat16"
    checkpoint: bool = True
    unroll: int = 1

    def vectors(self, side: str) -> int:
        """The largest budget of a side."""
        return {"query": self.query_tokens, "candidate": self.candidate_tokens}[side]


class Network(nnx.Module):
    """Backbone, Meta Tokens (query rows first) and head; parameters are float32."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.backbone = family(config.backbone).Backbone(config.architecture, rngs=rngs)
        rows, width = config.query_tokens + config.candidate_tokens, self.backbone.width
        self.meta_tokens = param(rngs, jax.nn.initializers.normal(config.meta_token_scale), (rows, width), (None, "embed"))
        dim = config.embedding_dim
        self.head = Linear(width, dim, axes=("embed", "output"), bias=False, rngs=rngs) if dim else None

    def __call__(self, batch: dict[str, Array], side: str, budget: int | None = None) -> Float[Array, "B R D"]:
        """The first `budget` vectors of each item of a side (all by default), float32, each of length one."""
        r = self.config.vectors(side) if budget is None else budget
        rows = r if side == "query" else self.config.query_tokens + r
        states_BRM = self.backbone(
            batch,
            self.meta_tokens[...][:rows],
            keep=r,
            dtype=jnp.dtype(self.config.dtype),
            checkpoint=self.config.checkpoint,
            unroll=self.config.unroll,
        )
        vectors_BRD = (states_BRM if self.head is None else self.head(states_BRM)).astype(jnp.float32)
        return vectors_BRD * jax.lax.rsqrt(jnp.sum(vectors_BRD**2, axis=-1, keepdims=True) + 1e-24)


def abstract_network(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The structure of a network, and its parameters as shapes with logical axes, for no memory.

    `nnx.merge(structure, parameters)` with nested dicts of arrays is a network that can be called.
    """
    return nnx.split(nnx.eval_shape(lambda: Network(config, rngs=nnx.Rngs(0))))


def init_parameters(config: ModelConfig, seed: int) -> dict:
    """Fresh parameters as nested dicts; under `jax.jit` with `out_shardings` made in their shards, the same on every mesh."""
    return nnx.to_pure_dict(nnx.state(Network(config, rngs=nnx.Rngs(seed))))
