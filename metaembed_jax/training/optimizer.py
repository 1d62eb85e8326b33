"""AdamW or Muon, with warm-up, decay and clipping by the global norm."""

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from optax.contrib import MuonDimensionNumbers, muon

from metaembed_jax.config.run import OptimizerConfig
from metaembed_jax.sharding import replicated


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to `learning_rate`, then linear or cosine decay to 0 at the last step."""
    peak, warmup = config.learning_rate, config.warmup_steps
    decay = {
        "linear": lambda: optax.linear_schedule(peak, 0.0, steps - warmup),
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps - warmup),
    }[config.decay]()
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of `config.optimizer`; weight decay acts on kernels alone.

    AdamW (arXiv 1711.05101) is the published recipe. Muon (arXiv 2502.16982) orthogonalises the momentum of the kernels and leaves
    all else to Adam; its updates are scaled to AdamW's usual size, so both take the same learning rates. From scratch it needs
    about half the steps.
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


def kernels(parameters: dict) -> dict:
    """True for the kernels of linear maps. (The stack axis makes counting dimensions useless: a stacked norm has two.)"""
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", parameters)


def _matrices(parameters: dict) -> dict:
    """Where Muon finds the matrix of each kernel: its last two axes, whatever is stacked in front. None: left to Adam."""
    is_kernel = kernels(parameters)
    return jax.tree.map(lambda x, yes: MuonDimensionNumbers(x.ndim - 2, x.ndim - 1) if yes else None, parameters, is_kernel)


def optimizer_shardings(mesh: Mesh, state: optax.OptState, by_parameter: dict) -> optax.OptState:
    """The sharding of every array of an abstract optimizer state: a moment lies as its parameter, all else is replicated."""
    of_path = {_keys(path): sharding for path, sharding in jax.tree_util.tree_leaves_with_path(by_parameter)}

    def of(path, _) -> NamedSharding:
        keys = _keys(path)  # a moment's path ends with its parameter's
        return next((of_path[keys[n:]] for n in range(len(keys)) if keys[n:] in of_path), replicated(mesh))

    return jax.tree_util.tree_map_with_path(of, state)


def _keys(path: tuple) -> tuple[str, ...]:
    return tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey))
