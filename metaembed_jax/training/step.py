"""One training step, as a pure function of (state, batch).

n rows of a step, V vectors of a row, T = n * V, B pairs, N documents, R vectors of an item, D width.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from metaembed_jax.backbones.lora import dropout_keys, dropout_of
from metaembed_jax.batch.training import TrainingBatch, check_microbatch
from metaembed_jax.config.objectives import PairVectors
from metaembed_jax.config.run import RunConfig
from metaembed_jax.errors import UserError
from metaembed_jax.mesh import make_mesh
from metaembed_jax.network import abstract_network, abstract_parameters, init_parameters
from metaembed_jax.network_config import model_config
from metaembed_jax.precision import float32_products
from metaembed_jax.sharding import batch_shards, replicated
from metaembed_jax.trainable import join, paths, split, trainable_paths
from metaembed_jax.training.microbatches import encode
from metaembed_jax.training.optimizer import learning_rate, make_optimizer, optimizer_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step turns into the next.

    Attributes:
      step: int32 scalar, the steps done; batch `step` comes next.
      parameters: those that train, float32.
      frozen: all others, which no step changes and no checkpoint holds: they are read from the run's base.
      optimizer: the state of optax.
    """

    step: Array
    parameters: dict
    frozen: dict
    optimizer: optax.OptState

    def network_parameters(self) -> dict:
        """All of them, as the network takes them."""
        return join(self.parameters, self.frozen)


def gather(vectors_TD: Float[Array, "T D"], starts_N: Int[Array, "N"], count: int) -> Float[Array, "N R D"]:
    """The vectors of items: `count` of each, from its first."""
    return jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(vectors_TD, start, count))(starts_N)


def make_loss(config: RunConfig, mesh: Mesh) -> Callable:
    """`loss(parameters, frozen, batch, step) -> (scalar, metrics)` of a run's configuration; `step` seeds the dropout."""
    graph, _, abstract_dropout = abstract_network(model_config(config, training=True))
    abstract_dropout = nnx.to_pure_dict(abstract_dropout)
    query_vectors, document_vectors = config.objectives.largest_budget

    def loss(parameters: dict, frozen: dict, batch: TrainingBatch, step: Array) -> tuple[Array, dict[str, Array]]:
        everything = join(parameters, frozen)
        keys = dropout_keys(abstract_dropout, jax.random.fold_in(jax.random.key(config.seed), step))

        def network_of(row_b):
            return nnx.merge(graph, everything, dropout_of(keys, row_b))

        # A bfloat16 model's vectors go on as bfloat16: half the bytes to gather and hold, and a similarity is one product on a TPU,
        # not six. Beside the noise of such a model (taken as 1 %), the rounding took the gradient's error from 2.9 to 3.4 % at
        # most; among items nearly all alike, from 30 to 51 %.
        vectors_nVD = encode(network_of, batch.rows, config.rows.recompute, config.model.dtype)
        vectors_TD = vectors_nVD.reshape(-1, vectors_nVD.shape[-1])
        query_BRD = gather(vectors_TD, batch.queries, query_vectors)
        document_NRD = gather(vectors_TD, batch.documents, document_vectors)
        pairs, negatives = query_BRD.shape[0], None
        if document_NRD.shape[0] > pairs:
            negatives = document_NRD[pairs:].reshape(pairs, -1, *document_NRD.shape[1:])
        source_B = batch.source if config.data.within_source else None
        with jax.named_scope("loss"):
            vectors = PairVectors(query_BRD, document_NRD[:pairs], negatives, batch.negative_mask, source_B)
            return config.objectives.loss(vectors, mesh)

    return loss


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The jitted functions of a run, and where its arrays lie.

    Attributes:
      mesh: all of it runs on.
      abstract: TrainState of shapes, dtypes and shardings: what restoring and compiling ahead of time start from.
      init: `(given={}) -> TrainState`, created in its shards; `given` holds the parameters that are not to be fresh.
      step: `(TrainState, batch) -> (TrainState, metrics)`; donates the state.
      loss: `(parameters, frozen, batch, step) -> (scalar, metrics)`, not jitted.
    """

    mesh: Mesh
    abstract: TrainState
    init: Callable
    step: Callable
    loss: Callable


def abstract_state(config: RunConfig, mesh: Mesh, optimizer: optax.GradientTransformation) -> TrainState:
    """A run's state as shapes, dtypes and shardings. What trains is float32; frozen kernels have `config.model.frozen_dtype`.

    Raises:
      UserError: `config.model.trained` does not fit the network.
    """
    everything = abstract_parameters(model_config(config), mesh, config.model.frozen_dtype)
    parameters, frozen = split(everything, trainable_paths(config.model.trained, paths(everything)))
    for path in flatten_dict(frozen, sep="."):
        if not path.startswith("backbone."):
            raise UserError(
                f"config.model.trained leaves {path} frozen, and no base holds it; add ({path.partition('.')[0] + '*'!r}, 'full')"
            )
    for path, leaf in flatten_dict(parameters, sep=".").items():
        if path.endswith("kernel_scale"):
            raise UserError(f"config.model.trained has {path} train, the scale of an int8 kernel; narrow the pattern")
        if leaf.dtype == jnp.int8:
            raise UserError(
                f"config.model.frozen_dtype=int8, but config.model.trained has {path} train in full; freeze it or choose bfloat16"
            )
    parameters = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding), parameters)
    moments = jax.eval_shape(optimizer.init, parameters)
    lies = optimizer_shardings(mesh, moments, jax.tree.map(lambda leaf: leaf.sharding, parameters))
    moments = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), moments, lies)
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh)), parameters, frozen, moments)


def make_init(config: RunConfig, abstract: TrainState, optimizer: optax.GradientTransformation) -> Callable:
    """`init(given)` of a Trainer."""
    wanted = join(abstract.parameters, abstract.frozen)

    def init(given: dict | None = None) -> TrainState:
        given = given or {}
        _, lacking = split(wanted, paths(given))

        def fresh() -> dict:
            _, made = split(init_parameters(model_config(config), config.seed), paths(given))
            return jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), made, lacking)

        made = jax.jit(fresh, out_shardings=_shardings(lacking))()
        parameters, frozen = split(join(given, made), paths(abstract.parameters))
        moments = jax.jit(optimizer.init, out_shardings=_shardings(abstract.optimizer))(parameters)
        return TrainState(jax.device_put(np.int32(0), abstract.step.sharding), parameters, frozen, moments)

    return init


def run_mesh(config: RunConfig, devices: Sequence | None = None) -> Mesh:
    """The mesh of a run, over all devices by default.

    Raises:
      UserError: it does not fit the devices, or pairs or a microbatch do not divide over it.
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
    """Builds the functions of a run for a mesh, without touching a device."""
    optimizer = make_optimizer(config.optimizer, config.schedule.steps)
    schedule = learning_rate(config.optimizer, config.schedule.steps)
    abstract, loss = abstract_state(config, mesh, optimizer), make_loss(config, mesh)

    def step(state: TrainState, batch: TrainingBatch) -> tuple[TrainState, dict[str, Array]]:
        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.parameters, state.frozen, batch, state.step)
        with jax.named_scope("optimizer"), float32_products(config.model.dtype):  # Muon's products
            updates, moments = optimizer.update(gradients, state.optimizer, state.parameters)
            parameters = optax.apply_updates(state.parameters, updates)
        metrics = {"loss": value, **metrics, "gradient_norm": optax.global_norm(gradients), "learning_rate": schedule(state.step)}
        return TrainState(state.step + 1, parameters, state.frozen, moments), metrics

    return Trainer(
        mesh=mesh,
        abstract=abstract,
        init=make_init(config, abstract, optimizer),
        step=_on(mesh, jax.jit(step, out_shardings=(_shardings(abstract), replicated(mesh)), donate_argnums=0)),
        loss=loss,
    )


def _shardings(abstract):
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _on(mesh: Mesh, function: Callable) -> Callable:
    """Calls (and traces, and lowers) a jitted function under `jax.set_mesh`, which `sharding.constrain` reads."""

    def under_mesh(method: Callable) -> Callable:
        def call(*arguments):
            with jax.set_mesh(mesh):
                return method(*arguments)

        return call

    call = under_mesh(function)
    call.trace, call.lower = under_mesh(function.trace), under_mesh(function.lower)
    return call
