"""One training step, as a pure function of (state, batch).

M microbatches, b items of a microbatch, B pairs, N candidates, K negatives a pair, R vectors, D width.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from metaembed_jax.config import model_config
from metaembed_jax.late_interaction.matryoshka import matryoshka_loss
from metaembed_jax.network import abstract_network, init_parameters
from metaembed_jax.sharding import named_sharding, parameter_shardings, replicated
from metaembed_jax.training.optimizer import learning_rate, make_optimizer, optimizer_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step turns into the next: everything that a checkpoint must hold.

    Attributes:
      step: int32 scalar, the steps done; batch `step` comes next.
      parameters: float32.
      optimizer: the state of optax.
    """

    step: Array
    parameters: dict
    optimizer: optax.OptState


def encode(graph: nnx.GraphDef, parameters: dict, side_batch: dict, side: str, budget: int) -> Float[Array, "N R D"]:
    """Vectors of one side, in pair order.

    Microbatches are mapped over with a checkpointed encoder: the backward pass recomputes one microbatch at a time, so memory
    follows the microbatch while the gradient is the whole batch's (GradCache, arXiv 2101.06983).

    Args:
      side_batch: `groups`, one dict of `[M, b, ...]` arrays for each shape class, and `order` [N].
    """

    def encoder(microbatch):
        return nnx.merge(graph, parameters)(microbatch, side, budget)

    def encode_group(group):
        microbatches, size = group["tokens"].shape[:2]
        if microbatches == 1:
            return encoder(jax.tree.map(lambda x: x[0], group))
        vectors_MbRD = jax.lax.map(jax.checkpoint(encoder), group)
        return vectors_MbRD.reshape(microbatches * size, *vectors_MbRD.shape[2:])

    vectors = jnp.concatenate([encode_group(group) for group in side_batch["groups"]])
    return vectors[side_batch["order"]]


def make_loss(config: ConfigDict, graph: nnx.GraphDef, mesh: Mesh) -> Callable:
    """`loss(parameters, batch) -> (scalar, metrics)` of a run's configuration."""
    query_budget, candidate_budget = (max(group[side] for group in config.groups) for side in (0, 1))

    def loss(parameters: dict, batch: dict) -> tuple[Array, dict[str, Array]]:
        query_BRD = encode(graph, parameters, batch["query"], "query", query_budget)
        candidate_NRD = encode(graph, parameters, batch["candidate"], "candidate", candidate_budget)
        pairs = query_BRD.shape[0]
        positive_BRD, negatives = candidate_NRD[:pairs], None
        if candidate_NRD.shape[0] > pairs:
            negatives = candidate_NRD[pairs:].reshape(pairs, -1, *candidate_NRD.shape[1:])
        return matryoshka_loss(
            query_BRD,
            positive_BRD,
            negatives,
            groups=config.groups,
            temperature=config.temperature,
            normalization=config.normalization,
            mesh=mesh,
        )

    return loss


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The jitted functions of a run, and where its arrays lie.

    Attributes:
      mesh: all of it runs on.
      abstract: TrainState of shapes, dtypes and shardings: what restoring and compiling ahead of time start from.
      init: `() -> TrainState`, created in its shards.
      step: `(TrainState, batch) -> (TrainState, metrics)`; donates the state.
      loss: `(parameters, batch) -> (scalar, metrics)`, not jitted.
    """

    mesh: Mesh
    abstract: TrainState
    init: Callable
    step: Callable
    loss: Callable


def make_trainer(config: ConfigDict, mesh: Mesh) -> Trainer:
    """Builds the functions of a run for a mesh, without touching a device."""
    network = model_config(config)
    graph, abstract_parameters = abstract_network(network)
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = learning_rate(config.optimizer, config.steps)
    loss = make_loss(config, graph, mesh)

    def init() -> TrainState:
        parameters = init_parameters(network, config.seed)
        return TrainState(jnp.zeros((), jnp.int32), parameters, optimizer.init(parameters))

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict[str, Array]]:
        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.parameters, batch)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
        metrics = {"loss": value, **metrics, "gradient_norm": optax.global_norm(gradients), "learning_rate": schedule(state.step)}
        return TrainState(state.step + 1, optax.apply_updates(state.parameters, updates), optimizer_state), metrics

    abstract = jax.eval_shape(init)
    by_parameter = parameter_shardings(mesh, abstract_parameters)
    shardings = TrainState(replicated(mesh), by_parameter, optimizer_shardings(mesh, abstract.optimizer, by_parameter))
    place = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )
    return Trainer(
        mesh=mesh,
        abstract=place,
        init=_on(mesh, jax.jit(init, out_shardings=shardings)),
        step=_on(mesh, jax.jit(step, out_shardings=(shardings, replicated(mesh)), donate_argnums=0)),
        loss=loss,
    )


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


def put_batch(batch: dict, mesh: Mesh) -> dict:
    """A host batch onto the mesh: items of a microbatch over the batch axes, `order` replicated."""

    def put(path, x):
        if path[-1].key == "order":
            return jax.device_put(x, replicated(mesh))
        axes = (None, "batch") + (None,) * (x.ndim - 2)
        return jax.device_put(x, named_sharding(mesh, axes))

    return jax.tree.map_with_path(put, batch)
