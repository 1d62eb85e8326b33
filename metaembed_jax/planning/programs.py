"""Programs to plan: jitted functions with abstract inputs on a mesh. No data, weights or tokenizer are needed."""

from collections.abc import Callable
from typing import NamedTuple

from jax.sharding import Mesh

from metaembed_jax.batch import training
from metaembed_jax.batch.rows import abstract
from metaembed_jax.batch.training import step_shape
from metaembed_jax.config.keys import with_keys
from metaembed_jax.config.run import RunConfig
from metaembed_jax.encoding.schedule import CALL_ROWS
from metaembed_jax.flops import Flops, encode_flops, train_flops
from metaembed_jax.links import slice_size
from metaembed_jax.mesh import make_mesh, smallest_fsdp
from metaembed_jax.network import abstract_parameters, make_encode
from metaembed_jax.network_config import model_config
from metaembed_jax.planning.topology import Topology
from metaembed_jax.planning.typical_rows import typical_rows
from metaembed_jax.sharding import batch_shards, shard_bytes
from metaembed_jax.training.step import make_trainer


class CallRows(NamedTuple):
    """The packed rows of a call.

    Attributes:
      tokens, patches, vectors: capacity of a row.
      rows: number of rows over all devices, including empty ones.
      at_once: rows of a microbatch.
      used_tokens, used_patches: the average share that items of typical sizes use.
    """

    tokens: int
    patches: int
    vectors: int
    rows: int
    at_once: int
    used_tokens: float
    used_patches: float


class Program(NamedTuple):
    """A jitted function with its arguments.

    Attributes:
      trace: `() -> jax.stages.Traced`.
      arguments: shapes with shardings, by content.
      flops: FLOPs of one call, over all devices.
      items, unit: number and kind of items of one call.
      calls: number of calls in a whole run; 0 for a program without runs.
      rows: rows of one call; None for a program without rows.
      details: a line about the call; empty if the rows say it all.
      index_bytes: bytes of a device's vectors, which a search of all of them reads once; 0 for other programs.
    """

    trace: Callable
    arguments: dict
    flops: Flops
    items: int
    unit: str
    calls: int = 0
    rows: CallRows | None = None
    details: str = ""
    index_bytes: float = 0


def train_program(config: RunConfig, mesh: Mesh) -> Program:
    """Return the train step, as `train.py` runs it on items of typical sizes.

    Raises:
      UserError: `config.model.trained` or `config.rows.size` do not fit the network, or `config.rows.microbatch_rows` the mesh.
    """
    row, typical = typical_rows(config)
    shape = step_shape(row, typical.largest, config.rows.microbatch_rows, batch_shards(mesh))
    layout = model_config(config).architecture.layout
    has_scores = config.objectives.reads_teacher_scores
    batch = training.abstract(shape, config.rows.batch_size, config.data.negatives, layout, mesh, has_scores)
    trainer = make_trainer(config, mesh)
    state = trainer.abstract
    arguments = {"trained": state.parameters, "frozen": state.frozen, "optimizer": state.optimizer, "batch": batch}
    used = typical.mean / shape.rows
    return Program(
        lambda: trainer.step.trace(state, batch),
        arguments,
        train_flops(config, shape),
        config.rows.batch_size,
        "pairs",
        config.schedule.steps,
        CallRows(*row, shape.rows, shape.size, typical.fill.tokens * used, typical.fill.patches * used),
    )


def encode_program(config: RunConfig, mesh: Mesh) -> Program:
    """Return a full call of the encoder, at the largest budget and with items of typical sizes."""
    network = model_config(config)
    row, typical = typical_rows(config)
    rows = CALL_ROWS[0] * batch_shards(mesh)
    parameters = abstract_parameters(network, mesh)
    batch = abstract(rows, row, network.architecture.layout, mesh)
    encode = make_encode(network, mesh)
    items = round(rows * config.rows.batch_size * (2 + config.data.negatives) / typical.mean)
    return Program(
        lambda: encode.trace(parameters, batch),
        {"frozen": parameters, "batch": batch},
        encode_flops(config, row, rows),
        items,
        "items",
        rows=CallRows(*row, rows, rows, typical.fill.tokens, typical.fill.patches),
    )


def with_index_mesh(config: RunConfig, slices: Topology) -> RunConfig:
    """Return the config with the mesh that `metaembed index` has by default."""
    weights = shard_bytes(abstract_parameters(model_config(config), make_mesh(devices=slices.devices)))
    fsdp = smallest_fsdp(weights, int(slices.chip.usable_bytes), slice_size(slices.devices))
    return with_keys(config, {"mesh.data": -1, "mesh.fsdp": fsdp, "mesh.tensor": 1, "mesh.slices": 0})


PROGRAMS = {"train": train_program, "encode": encode_program}
