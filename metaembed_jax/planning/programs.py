"""The programs that can be planned: their inputs as shapes on a mesh, made without data, weights or a tokenizer."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from metaembed_jax.config import model_config
from metaembed_jax.data.slots import Slots, slots
from metaembed_jax.inputs.examples import Layout, ShapeClass, blank, collate
from metaembed_jax.late_interaction.topk import top_k
from metaembed_jax.model import BATCH_SIZE, make_encode
from metaembed_jax.network import abstract_parameters
from metaembed_jax.planning.flops import Flops, encode_flops, search_flops, train_flops
from metaembed_jax.sharding import batch_shards, named_sharding, replicated
from metaembed_jax.training.step import batch_sharding, make_trainer

SEARCH_QUERIES, SEARCH_CANDIDATES, SEARCH_K = 32, 100_000, 10


class Program(NamedTuple):
    """A jitted function and what it is called with.

    Attributes:
      trace: `() -> jax.stages.Traced`.
      arguments: the inputs as shapes with shardings, by what they are.
      flops: of one call, over all devices.
      items: that one call handles.
      unit: what an item is.
      calls: of a whole run; 0 where there is no such thing.
    """

    trace: Callable
    arguments: dict
    flops: Flops
    items: int
    unit: str
    calls: int = 0


def train_program(config: ConfigDict, mesh: Mesh) -> Program:
    """The train step, as `train.py` runs it.

    Raises:
      UserError: `config.trained` or the shape classes do not fit the network.
    """
    trainer, batch = make_trainer(config, mesh), abstract_batch(config, mesh)
    state = trainer.abstract
    arguments = {"trained": state.parameters, "frozen": state.frozen, "optimizer": state.optimizer, "batch": batch}
    return Program(
        lambda: trainer.step.trace(state, batch), arguments, train_flops(config), config.batch_size, "pairs", config.steps
    )


def encode_program(config: ConfigDict, mesh: Mesh) -> Program:
    """`MetaEmbed.encode_document` on a full batch of the largest candidate class, at the largest budget."""
    network = model_config(config)
    parameters = abstract_parameters(network, mesh)
    shape = ShapeClass(*max(config.data.candidate_shapes)[:2])
    rows = BATCH_SIZE * batch_shards(mesh)
    arrays = _row(shape, network.architecture.layout).items()
    batch = {
        key: _abstract((rows, *x.shape[1:]), x.dtype, named_sharding(mesh, ("batch",) + (None,) * (x.ndim - 1)))
        for key, x in arrays
    }
    encode = make_encode(network, mesh)

    return Program(
        lambda: encode.trace(parameters, batch, side="candidate", budget=config.candidate_tokens),
        {"frozen": parameters, "batch": batch},
        encode_flops(config, shape, rows),
        rows,
        "documents",
    )


def search_program(config: ConfigDict, mesh: Mesh) -> Program:
    """Exact search of `SEARCH_QUERIES` among at least `SEARCH_CANDIDATES` of all vectors, in bfloat16."""
    width = config.embedding_dim or model_config(config).architecture.width
    candidates = -(-SEARCH_CANDIDATES // mesh.size) * mesh.size
    everywhere = NamedSharding(mesh, PartitionSpec(tuple(mesh.axis_names)))
    query = _abstract((SEARCH_QUERIES, config.query_tokens, width), jnp.bfloat16, replicated(mesh))
    candidate = _abstract((candidates, config.candidate_tokens, width), jnp.bfloat16, everywhere)
    return Program(
        lambda: top_k.trace(query, candidate, SEARCH_K, mesh),
        {"batch": query, "index": candidate},
        search_flops(SEARCH_QUERIES, config.query_tokens, candidates, config.candidate_tokens, width),
        SEARCH_QUERIES,
        "queries",
    )


PROGRAMS = {"train": train_program, "encode": encode_program, "search": search_program}


def abstract_batch(config: ConfigDict, mesh: Mesh) -> dict:
    """A training batch as shapes, dtypes and shardings: what `put_batch` makes of an element of `training_batches`.

    Raises:
      UserError: the shape classes do not fit the network or the batch.
    """
    architecture = model_config(config).architecture
    multiple, layout = architecture.patch_multiple, architecture.layout
    pairs, items = config.batch_size, config.batch_size * (1 + config.data.negatives)
    rows = np.arange(config.microbatch_size)
    batch = {
        "query": _side(slots(config, "query_shapes", pairs, multiple, rows), pairs, layout),
        "candidate": _side(slots(config, "candidate_shapes", items, multiple, rows), items, layout),
        "negative_mask": jax.ShapeDtypeStruct((pairs, config.data.negatives), bool),
        "source": jax.ShapeDtypeStruct((pairs,), jnp.int32),
    }
    return jax.tree.map_with_path(lambda path, x: _abstract(x.shape, x.dtype, batch_sharding(mesh, path, len(x.shape))), batch)


def _side(rows: Slots, items: int, layout: Layout) -> dict:
    groups = []
    for shape, microbatches in zip(rows.shapes, rows.microbatches, strict=True):
        arrays = _row(shape, layout) | {"item": np.zeros(1, np.int32)}
        groups.append({key: jax.ShapeDtypeStruct((microbatches, rows.size, *x.shape[1:]), x.dtype) for key, x in arrays.items()})
    return {"groups": tuple(groups), "order": jax.ShapeDtypeStruct((items,), jnp.int32)}


def _row(shape: ShapeClass, layout: Layout) -> dict[str, np.ndarray]:
    """The arrays of a batch of one item."""
    return collate([blank(layout)], shape, layout)


def _abstract(shape: tuple[int, ...], dtype, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
