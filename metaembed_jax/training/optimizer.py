"""AdamW with warm-up, decay and clipping by the global norm."""

import jax
import optax
from ml_collections import ConfigDict


def learning_rate(config: ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up to `learning_rate`, then linear or cosine decay to 0 at the last step."""
    peak, warmup = config.learning_rate, config.warmup_steps
    decay = {
        "linear": lambda: optax.linear_schedule(peak, 0.0, steps - warmup),
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps - warmup),
    }[config.decay]()
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """The optimizer of `config.optimizer`; weight decay acts on kernels alone."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=kernels,
        ),
    )


def kernels(parameters: dict) -> dict:
    """True for the kernels of linear maps. (The stack axis makes counting dimensions useless: a stacked norm has two.)"""
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", parameters)
