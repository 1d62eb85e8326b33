"""The network of MetaEmbed: a backbone with Meta Tokens at the end of each input. Their last states are a nested set of vectors.

B rows of a batch, V vectors of a row, R Meta Tokens, D width of a vector, M width of the backbone.

    query     [prompt, q_1 .. q_16]                 -> the states at q_1 .. q_16
    document  [prompt, q_1 .. q_16, c_1 .. c_64]    -> the states at c_1 .. c_64

Attention is causal, so Meta Tokens after the last one that is read change nothing. Queries run without the document tokens, and a
budget of r vectors runs only the tokens up to the r-th. `batch.rows` shows how items share rows.

With `readout="states"` no Meta Tokens follow a prompt, and the states at all its tokens are read, those of the template included.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from metaembed_jax.backbones.backbone import Backbone
from metaembed_jax.backbones.config import FamilyConfig
from metaembed_jax.backbones.family import family
from metaembed_jax.backbones.layers import Linear, param, store_int8
from metaembed_jax.backbones.lora import Dropout, LoraConfig, add_lora
from metaembed_jax.batch.rows import Batch
from metaembed_jax.precision import float32_products
from metaembed_jax.sharding import named_sharding, parameter_shardings

SIDES = ("query", "document")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The description of a network.

    Attributes:
      backbone: name of the family.
      architecture: the family's `Config`.
      readout: "meta_tokens", or "states" to read all tokens of a prompt.
      query_tokens, document_tokens: numbers of Meta Tokens, and so of vectors, of each side; with states, most tokens of a prompt.
      meta_token_scale: standard deviation of fresh Meta Tokens.
      embedding_dim: width of the linear head; 0 for none (vectors have the backbone's width).
      dtype: type of activations and matmuls, "float32" or "bfloat16".
      checkpoint: recompute each layer in the backward pass, to keep only its input.
      unroll: layers to a turn of the loop over a stack; more than 1 compiles longer and can run faster on CPU.
      lora: the adapters.
      int8: the kernels in the backbone's stacks are int8, with a scale for each output.
    """

    backbone: str
    architecture: FamilyConfig
    query_tokens: int = 16
    document_tokens: int = 64
    meta_token_scale: float = 0.02
    embedding_dim: int = 0
    dtype: str = "bfloat16"
    checkpoint: bool = True
    unroll: int = 1
    lora: LoraConfig = LoraConfig()
    int8: bool = False
    readout: str = "meta_tokens"

    @property
    def reads_states(self) -> bool:
        """True if the vectors of an item are the states at all its tokens, so that items differ in their number."""
        return self.readout == "states"

    def vectors(self, side: str) -> int:
        """Return the largest budget of a side, which is the most vectors of an item."""
        return {"query": self.query_tokens, "document": self.document_tokens}[side]

    def meta_tokens(self, side: str, budget: int) -> int:
        """Return the number of Meta Tokens after a prompt; the last `budget` of them are read."""
        if self.reads_states:
            return 0
        return budget if side == "query" else self.query_tokens + budget


class Network(nnx.Module):
    """Backbone, Meta Tokens (those of queries first) and head; parameters are float32, except int8 kernels."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.backbone: Backbone = family(config.backbone).Backbone(config.architecture, rngs=rngs)
        rows, width = config.query_tokens + config.document_tokens, self.backbone.width
        fresh = jax.nn.initializers.normal(config.meta_token_scale)
        self.meta_tokens = None if config.reads_states else param(rngs, fresh, (rows, width), (None, "embed"))
        dim = config.embedding_dim
        self.head = Linear(width, dim, axes=("embed", "output"), bias=False, rngs=rngs) if dim else None
        add_lora(self, config.lora, rngs=rngs)
        if config.int8:
            store_int8(self.backbone)

    def __call__(self, batch: Batch) -> Float[Array, "B V D"]:
        """Return the vectors at the positions `batch.reads`, float32, each of length one."""
        with float32_products(self.config.dtype):
            states_BVM = self.backbone(
                batch,
                jnp.zeros((0, self.backbone.width)) if self.meta_tokens is None else self.meta_tokens[...],
                dtype=jnp.dtype(self.config.dtype),
                checkpoint=self.config.checkpoint,
                unroll=self.config.unroll,
            )
            vectors_BVD = (states_BVM if self.head is None else self.head(states_BVM)).astype(jnp.float32)
            return vectors_BVD * jax.lax.rsqrt(jnp.sum(vectors_BVD**2, axis=-1, keepdims=True) + 1e-24)


def abstract_network(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Return a network's structure, and its parameters and `Dropout` as shapes with logical axes; allocates no memory.

    `nnx.merge(structure, parameters, dropout)` with nested dicts of arrays is a network that can be called; `dropout` is empty,
    and optional, unless `config.lora.dropout` is above 0.
    """
    network = nnx.eval_shape(lambda: Network(config, rngs=nnx.Rngs(0)))
    structure, parameters, dropout = nnx.split(network, nnx.Param, Dropout)
    return structure, parameters, dropout


def abstract_parameters(config: ModelConfig, mesh: Mesh, large: str = "") -> dict:
    """Return the parameters as nested dicts of shapes, with their shardings and the dtypes that inference needs.

    Kernels and the vocabulary have the dtype `large` (empty: the config's, in which they are used), but int8 kernels stay int8; all
    other parameters are float32.
    """
    _, state, _ = abstract_network(config)
    large = large if large in ("float32", "bfloat16") else config.dtype

    def with_dtype(path, leaf, sharding):
        is_large = path[-1].key in ("kernel", "embedding") and leaf.dtype != jnp.int8
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(large) if is_large else leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(with_dtype, nnx.to_pure_dict(state), parameter_shardings(mesh, state))


def init_parameters(config: ModelConfig, seed: int) -> dict:
    """Return fresh parameters as nested dicts; in `jax.jit` with `out_shardings`, in shards and with equal values on every mesh."""
    return nnx.to_pure_dict(nnx.state(Network(config, rngs=nnx.Rngs(seed)), nnx.Param))


def make_encode(config: ModelConfig, mesh: Mesh) -> Callable:
    """Return the jitted `(parameters, batch) -> vectors [B, V, D]` of a network, with rows over the batch axes of the mesh."""
    graph, _, _ = abstract_network(config)

    def encode(parameters, batch):
        return nnx.merge(graph, parameters)(batch)

    return jax.jit(encode, out_shardings=named_sharding(mesh, ("batch", None, None)))
