"""One training step, as a pure function of (state, batch).

n rows of a step, V vectors of a row, T = n * V, B pairs, N documents, R vectors of an item, D width.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, Sharding
from jaxtyping import Array, Float, Int

from metaembed_jax.backbones.lora import dropout_keys, dropout_of
from metaembed_jax.batch.rows import Batch
from metaembed_jax.batch.training import TrainingBatch, check_microbatch
from metaembed_jax.config.objectives import PairVectors
from metaembed_jax.config.run import RunConfig
from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.all_states import VectorCounts
from metaembed_jax.late_interaction.right_documents import ItemDigests
from metaembed_jax.mesh import make_mesh
from metaembed_jax.network import ModelConfig, abstract_network, abstract_parameters, init_parameters
from metaembed_jax.network_config import model_config
from metaembed_jax.precision import float32_products
from metaembed_jax.sharding import batch_shards, replicated
from metaembed_jax.trainable import join, paths, split, trainable_paths
from metaembed_jax.training.microbatches import encode
from metaembed_jax.training.optimizer import check_rates, learning_rate, make_optimizer, optimizer_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run between two steps.

    Attributes:
      step: int32 scalar, the number of steps done; batch `step` is next.
      parameters: the trained ones, float32.
      frozen: all others. No step changes them, and no checkpoint holds them: they are read from the run's base weights.
      optimizer: the state of optax.
    """

    step: Array
    parameters: dict
    frozen: dict
    optimizer: optax.OptState

    def network_parameters(self) -> dict:
        """Return all parameters of the network."""
        return join(self.parameters, self.frozen)


def gather(vectors_TD: Float[Array, "T D"], starts_N: Int[Array, "N"], count: int) -> Float[Array, "N R D"]:
    """Return `count` vectors of each item, from its start."""
    return jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(vectors_TD, start, count))(starts_N)


def gather_states(
    vectors_TD: Float[Array, "T D"], rows: Batch, starts_N: Int[Array, "N"], most: int
) -> tuple[Float[Array, "N R D"], Int[Array, "N"]]:
    """Return the vectors of each item and their number, for a model that reads all states: vector t of a step is that of token t.

    Args:
      rows: of a `TrainingBatch`.
      most: R; vectors beyond an item's own are those of others, or zeros.
    """
    segments_nS = rows.segments.reshape(-1, rows.segments.shape[-1])
    items_T = (segments_nS + jnp.arange(len(segments_nS))[:, None] * (segments_nS.shape[1] + 1)).reshape(-1, 1)
    # A slice that would end beyond the last vector would start earlier.
    vectors_TD, items_T1 = (jnp.pad(x, [(0, most), (0, 0)], constant_values=fill) for x, fill in ((vectors_TD, 0), (items_T, -1)))
    items_NR = gather(items_T1, starts_N, most)[..., 0]
    return gather(vectors_TD, starts_N, most), (items_NR == items_NR[:, :1]).sum(1)


def vectors_of_pairs(
    vectors_TD: Float[Array, "T D"], batch: TrainingBatch, largest: tuple[int, int], reads_states: bool
) -> tuple[Float[Array, "B Rq D"], Float[Array, "N Rd D"], VectorCounts | None]:
    """Return the query and document vectors of a step's pairs, and their numbers if all states are read."""
    if not reads_states:
        return gather(vectors_TD, batch.queries, largest[0]), gather(vectors_TD, batch.documents, largest[1]), None
    query_BRD, query_counts = gather_states(vectors_TD, batch.rows, batch.queries, largest[0])
    document_NRD, counts_N = gather_states(vectors_TD, batch.rows, batch.documents, largest[1])
    positives_B, negatives = jnp.split(counts_N, query_counts.shape)
    return query_BRD, document_NRD, VectorCounts(query_counts, positives_B, negatives.reshape(batch.negative_mask.shape))


def digests_of_pairs(batch: TrainingBatch) -> ItemDigests:
    """Return the digests of a batch's items, by pair; those of a missing negative are its positive's."""
    digest_TW = jnp.moveaxis(batch.digests, 2, 3).reshape(-1, batch.digests.shape[2])
    pairs, words = batch.queries.shape[0], digest_TW.shape[1]
    document_NW = digest_TW[batch.documents]
    return ItemDigests(digest_TW[batch.queries], document_NW[:pairs], document_NW[pairs:].reshape(pairs, -1, words))


def make_loss(config: RunConfig, mesh: Mesh) -> Callable:
    """Return `loss(parameters, frozen, batch, step) -> (scalar, metrics)`; `step` seeds the dropout."""
    network = model_config(config, training=True)
    graph, _, abstract_dropout = abstract_network(network)
    abstract_dropout = nnx.to_pure_dict(abstract_dropout)

    def loss(parameters: dict, frozen: dict, batch: TrainingBatch, step: Array) -> tuple[Array, dict[str, Array]]:
        network_parameters = join(parameters, frozen)
        keys = dropout_keys(abstract_dropout, jax.random.fold_in(jax.random.key(config.seed), step))

        def network_of(row_b):
            return nnx.merge(graph, network_parameters, dropout_of(keys, row_b))

        # The vectors of a bfloat16 model stay bfloat16: they take half the bytes, and a TPU computes a similarity as one product
        # instead of six. Such a model has noise (1 % in this measurement), and rounding raised the error of the gradient from 2.9
        # to 3.4 % at most; for items that are nearly all alike, from 30 to 51 %.
        vectors_nVD = encode(network_of, batch.rows, config.rows.recompute, config.model.dtype)
        vectors_TD = vectors_nVD.reshape(-1, vectors_nVD.shape[-1])
        largest = config.objectives.largest_budget
        query_BRD, document_NRD, counts = vectors_of_pairs(vectors_TD, batch, largest, network.reads_states)
        pairs, negatives = query_BRD.shape[0], None
        if document_NRD.shape[0] > pairs:
            negatives = document_NRD[pairs:].reshape(pairs, -1, *document_NRD.shape[1:])
        source_B = batch.source if config.data.within_source else None
        digests = digests_of_pairs(batch)
        with jax.named_scope("loss"):
            items = query_BRD, document_NRD[:pairs], negatives
            numbers = batch.teacher_scores, batch.labels
            vectors = PairVectors(*items, batch.negative_mask, source_B, digests, *numbers, counts)
            return config.objectives.loss(vectors, mesh)

    return loss


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The jitted functions of a run, and the shardings of its arrays.

    Attributes:
      mesh: mesh of all arrays.
      abstract: the state as shapes, dtypes and shardings, to restore checkpoints and to compile ahead of time.
      init: `(given={}) -> TrainState`, created in its shards; parameters that `given` lacks are fresh.
      step: `(TrainState, batch) -> (TrainState, metrics)`; donates the state.
      loss: `(parameters, frozen, batch, step) -> (scalar, metrics)`, not jitted.
    """

    mesh: Mesh
    abstract: TrainState
    init: Callable[..., TrainState]
    step: Any
    loss: Callable


def abstract_state(config: RunConfig, mesh: Mesh, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state of a run as shapes, dtypes and shardings.

    Trained parameters are float32; frozen kernels have `config.model.frozen_dtype`.

    Raises:
      UserError: `config.model.trained` or `config.optimizer.rates` do not fit the network.
    """
    network_parameters = abstract_parameters(model_config(config), mesh, config.model.frozen_dtype)
    parameters, frozen = split(network_parameters, trainable_paths(config.model.trained, paths(network_parameters)))
    for path in sorted(paths(frozen)):
        if not path.startswith("backbone."):
            raise UserError(
                f"config.model.trained leaves {path} frozen, and base weights do not have it; "
                f"add ({path.partition('.')[0] + '*'!r}, 'full')"
            )
    trained: dict[str, Any] = flatten_dict(parameters, sep=".")
    check_rates(config.optimizer.rates, trained)
    for path, leaf in trained.items():
        if path.endswith("kernel_scale"):
            raise UserError(f"config.model.trained matches {path}, the scale of an int8 kernel; expected a narrower pattern")
        if leaf.dtype == jnp.int8:
            raise UserError(
                f"config.model.frozen_dtype=int8, but config.model.trained has {path} train in full; freeze it or choose bfloat16"
            )
    parameters = jax.tree.map(lambda leaf: _abstract(leaf.shape, jnp.float32, leaf.sharding), parameters)
    moments = jax.eval_shape(optimizer.init, parameters)
    shardings = optimizer_shardings(mesh, moments, _shardings(parameters))
    moments = jax.tree.map(lambda leaf, sharding: _abstract(leaf.shape, leaf.dtype, sharding), moments, shardings)
    return TrainState(_abstract((), jnp.int32, replicated(mesh)), parameters, frozen, moments)


def make_init(network: ModelConfig, seed: int, abstract: TrainState, optimizer: optax.GradientTransformation) -> Callable:
    """Return `Trainer.init`.

    Args:
      seed: seed of fresh parameters.
    """

    def init(given: dict | None = None) -> TrainState:
        given = given or {}
        _, missing = split(abstract.network_parameters(), paths(given))

        def make_missing() -> dict:
            _, fresh = split(init_parameters(network, seed), paths(given))
            return jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), fresh, missing)

        fresh = jax.jit(make_missing, out_shardings=_shardings(missing))()
        parameters, frozen = split(join(given, fresh), paths(abstract.parameters))
        moments = jax.jit(optimizer.init, out_shardings=_shardings(abstract.optimizer))(parameters)
        return TrainState(jax.device_put(np.int32(0), abstract.step.sharding), parameters, frozen, moments)

    return init


def run_mesh(config: RunConfig, devices: Sequence | None = None) -> Mesh:
    """Return the mesh of a run, over all devices by default.

    Raises:
      UserError: it does not fit the devices, or does not divide the pairs of a step or the rows of a microbatch.
    """
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    if config.rows.batch_size % (shards := batch_shards(mesh)):
        raise UserError(
            f"config.rows.batch_size={config.rows.batch_size} does not divide over the mesh {dict(mesh.shape)}: "
            f"expected a multiple of data x fsdp = {shards}"
        )
    check_microbatch(config.rows.microbatch_rows, shards)
    return mesh


def make_trainer(config: RunConfig, mesh: Mesh) -> Trainer:
    """Make the functions of a run for a mesh, without touching a device."""
    optimizer = make_optimizer(config.optimizer, config.schedule.steps)
    schedule = learning_rate(config.optimizer, config.schedule.steps)
    abstract, loss = abstract_state(config, mesh, optimizer), make_loss(config, mesh)

    def step(state: TrainState, batch: TrainingBatch) -> tuple[TrainState, dict[str, Array]]:
        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.parameters, state.frozen, batch, state.step)
        with jax.named_scope("optimizer"), float32_products(config.model.dtype):  # Muon's products
            updates, moments = optimizer.update(gradients, state.optimizer, state.parameters)
            parameters = optax.apply_updates(state.parameters, updates)
        metrics = {"loss": value, **metrics, "gradient_norm": optax.global_norm(gradients), "learning_rate": schedule(state.step)}
        # optax annotates a tree of parameters as if it could be a single number.
        return TrainState(state.step + 1, parameters, state.frozen, moments), metrics  # pyright: ignore[reportArgumentType]

    return Trainer(
        mesh=mesh,
        abstract=abstract,
        init=make_init(model_config(config), config.seed, abstract, optimizer),
        step=_under(mesh, jax.jit(step, out_shardings=(_shardings(abstract), replicated(mesh)), donate_argnums=0)),
        loss=loss,
    )


def _abstract(shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _shardings(abstract: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _under(mesh: Mesh, function: Any) -> Any:
    """Return a jitted function that is called, traced and lowered under `jax.set_mesh`, which `sharding.constrain` reads."""

    def under_mesh(method: Callable) -> Callable:
        def call(*arguments):
            with jax.set_mesh(mesh):
                return method(*arguments)

        return call

    call: Any = under_mesh(function)
    call.trace, call.lower = under_mesh(function.trace), under_mesh(function.lower)
    return call
