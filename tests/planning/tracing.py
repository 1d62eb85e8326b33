"""The FLOPs of a config's loss and gradient, as JAX traces them."""

import importlib.util
from pathlib import Path

import jax

from metaembed_jax.batch import training
from metaembed_jax.network_config import architecture_of
from metaembed_jax.planning.planner import branch_shares
from metaembed_jax.training.step import make_trainer, run_mesh


def traced_flops(config, shape):
    """Return the FLOPs of one step on rows of this shape, without the optimizer."""
    mesh = run_mesh(config, jax.devices()[:1])
    trainer, layout = make_trainer(config, mesh), architecture_of(config.model).layout
    batch = training.abstract(shape, config.rows.batch_size, config.data.negatives, layout, mesh)
    step = jax.jit(jax.value_and_grad(trainer.loss, has_aux=True))
    with jax.set_mesh(mesh):
        arguments = trainer.abstract.parameters, trainer.abstract.frozen, batch, trainer.abstract.step
        return _benchmark().traced_flops(step, *arguments, branches=branch_shares(config.model))


def _benchmark():
    """Import benchmarks/flops.py, which is not in a package."""
    file = Path(__file__).parents[2] / "benchmarks" / "flops.py"
    spec = importlib.util.spec_from_file_location("flops", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
