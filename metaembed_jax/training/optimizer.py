"""AdamW or Muon, with warm-up, decay, clipping by the global norm, and learning rates by parameter."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from optax.contrib import MuonDimensionNumbers, muon

from metaembed_jax.config.run import OptimizerConfig
from metaembed_jax.errors import UserError
from metaembed_jax.sharding import replicated
from metaembed_jax.trainable import LORA

Rates = tuple[tuple[str, float], ...]  # `config.optimizer.rates`


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
    transformations = [optax.clip_by_global_norm(config.clip_norm), make[config.algorithm]()]
    return optax.chain(*transformations, *([scale_by_rates(config.rates)] if config.rates else []))


def scale_by_rates(rates: Rates) -> optax.GradientTransformation:
    """Return the transformation that multiplies the update of a parameter, weight decay included, by the factor of its rate."""

    def scale(path: tuple, update: jax.Array) -> jax.Array:
        factor = rate_factor(rates, ".".join(_keys(path)))
        return update if factor == 1 else update * factor

    return optax.stateless(lambda updates, _: jax.tree.map_with_path(scale, updates))


def rate_factor(rates: Rates, path: str) -> float:
    """Return the factor of a parameter's learning rate: that of the first pattern that matches it, else 1.

    A pattern that matches a kernel also matches the adapter next to it, as in `config.model.trained`.
    """
    names = {path, path.partition(LORA)[0] + ".kernel"} if LORA in path else {path}
    return next((factor for pattern, factor in rates if any(fnmatchcase(name, pattern) for name in names)), 1.0)


def check_rates(rates: Rates, trained: Iterable[str]) -> None:
    """Check that each pattern matches a trained parameter.

    Args:
      trained: the paths of all trained parameters.

    Raises:
      UserError: a pattern matches none.
    """
    trained = sorted(trained)
    for pattern, factor in rates:
        if not any(rate_factor(((pattern, 2.0),), path) == 2.0 for path in trained):
            raise UserError(
                f"config.optimizer.rates: {pattern!r} (factor {factor:g}) matches none of the trained parameters "
                f"{', '.join(trained)}; remove it, or change the pattern"
            )


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
