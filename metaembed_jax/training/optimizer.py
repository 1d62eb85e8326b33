"""AdamW or Muon, with warm-up, decay and clipping by the global norm."""

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from optax.contrib import MuonDimensionNumbers, muon

from metaembed_jax.config.run import OptimizerConfig
from metaembed_jax.sharding import replicated


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the schedule: linear warm-up to `config.learning_rate`, then linear or cosine decay to 0 at the last step."""
    peak, warmup = config.learning_rate, config.warmup_steps
    decay = {
        "linear": lambda: optax.linear_schedule(peak, 0.0, steps - warmup),
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps - warmup),
    }[config.decay]()
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Return the optimizer of a run. Weight decay is applied to kernels only.

    AdamW (arXiv 1711.05101) is the published recipe. Muon (arXiv 2502.16982) orthogonalises the momentum of kernels and uses Adam
    for all other parameters. Its updates are scaled to the usual size of AdamW's, so both take the same learning rates. Muon needs
    about half the steps when a model is trained from scratch.
    """
    rate = learning_rate(config, steps)
    make = {
        "adamw": lambda: optax.adamw(
            rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=kernels
        ),
        "muon": lambda: muon(
            rate,
            adam_b1=config.b1,
            adam_b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            weight_decay_mask=kernels,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,
        ),
    }
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), make[config.algorithm]())


def kernels(parameters: optax.Params) -> optax.Params:
    """Return a tree that is true for the kernels of linear maps.

    The number of dimensions does not identify them: the scale of a norm has two dimensions in a stack of layers.
    """
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", parameters)


def _matrices(parameters: optax.Params) -> optax.Params:
    """Return the axes of each kernel's matrix for Muon: the last two, after any stack axes. None: the parameter is Adam's."""
    is_kernel = kernels(parameters)
    return jax.tree.map(lambda x, yes: MuonDimensionNumbers(x.ndim - 2, x.ndim - 1) if yes else None, parameters, is_kernel)


def optimizer_shardings(mesh: Mesh, state: optax.OptState, by_parameter: dict) -> optax.OptState:
    """Return the sharding of every array of an abstract optimizer state.

    A moment is sharded as its parameter; all other arrays are replicated.
    """
    of_path = {_keys(path): sharding for path, sharding in jax.tree_util.tree_leaves_with_path(by_parameter)}

    def sharding_of(path: tuple, _: object) -> NamedSharding:
        keys = _keys(path)  # the path of a moment ends with the path of its parameter
        return next((of_path[keys[n:]] for n in range(len(keys)) if keys[n:] in of_path), replicated(mesh))

    return jax.tree_util.tree_map_with_path(sharding_of, state)


def _keys(path: tuple) -> tuple[str, ...]:
    return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
