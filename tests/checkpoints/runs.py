"""Runs that took no time to train."""

import jax
import numpy as np

from metaembed_jax.checkpoints.runs import RunCheckpoints
from metaembed_jax.checkpoints.workdir import create_workdir
from metaembed_jax.mesh import make_mesh
from metaembed_jax.training.initialize import find_start, initial_state
from metaembed_jax.training.step import make_trainer


def save_noise(config, workdir):
    """A run's folder after one step that put noise into all that trains."""
    config, start = find_start(config)
    trainer = make_trainer(config, make_mesh())
    create_workdir(workdir, config, start.tokenizer, start.base, {})
    checkpoints, noise = RunCheckpoints(workdir), np.random.default_rng(0)
    state = initial_state(config, trainer, checkpoints, start)
    parameters = jax.tree.map(lambda leaf: leaf + 0.05 * noise.normal(size=leaf.shape).astype(leaf.dtype), state.parameters)
    checkpoints.save(1, parameters, state.optimizer, None)
    checkpoints.close()
