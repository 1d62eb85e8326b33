"""The updates of the optimizers on the parameters of a network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaembed_jax.config import OptimizerConfig
from metaembed_jax.training.optimizer import learning_rate, make_optimizer


def settings(**changes):
    return OptimizerConfig(warmup_steps=10, learning_rate=1e-2, **changes)


def tree(seed):
    """A stack of kernels, the norms of a stack, and Meta Tokens, which is each kind of parameter that there is."""
    keys = iter(jax.random.split(jax.random.key(seed), 3))
    shapes = {"layers": {"up": {"kernel": (3, 8, 24)}, "norm": {"scale": (3, 8)}}, "meta_tokens": (80, 8)}
    return jax.tree.map(lambda shape: jax.random.normal(next(keys), shape), shapes, is_leaf=lambda x: isinstance(x, tuple))


def updates_of(config, gradients, parameters, steps=1):
    optimizer = make_optimizer(config, 100)
    state = optimizer.init(parameters)
    for _ in range(steps):
        updates, state = optimizer.update(gradients, state, parameters)
    return updates


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_the_rate_rises_then_falls_to_zero(decay):
    rate = learning_rate(settings(decay=decay), 100)
    values = [float(rate(step)) for step in range(101)]
    assert values[0] == 0 and values[10] == pytest.approx(1e-2) and values[100] == pytest.approx(0, abs=1e-9)
    assert values[:11] == sorted(values[:11]) and values[10:] == sorted(values[10:], reverse=True)


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_weight_decay_acts_on_kernels_alone(algorithm):
    parameters, nothing = tree(0), jax.tree.map(jnp.zeros_like, tree(0))
    updates = updates_of(settings(algorithm=algorithm, weight_decay=0.5), nothing, parameters, steps=2)
    shrunk = -learning_rate(settings(), 100)(1) * 0.5 * parameters["layers"]["up"]["kernel"]
    np.testing.assert_allclose(updates["layers"]["up"]["kernel"], shrunk, rtol=1e-5)
    assert not updates["layers"]["norm"]["scale"].any() and not updates["meta_tokens"].any()


def test_muon_orthogonalises_each_matrix_of_a_stack_and_leaves_the_rest_to_adam():
    parameters, gradients = tree(0), tree(1)
    updates = updates_of(settings(algorithm="muon"), gradients, parameters, steps=2)
    size = 0.2 * np.sqrt(24) * float(learning_rate(settings(), 100)(1))  # consistent with AdamW's root mean square
    for update in np.asarray(updates["layers"]["up"]["kernel"]):
        singular = np.linalg.svd(update, compute_uv=False) / size
        assert singular.min() > 0.6 and singular.max() < 1.3  # Newton-Schulz stops there on purpose
    for update, gradient in (
        (updates["layers"]["norm"]["scale"], gradients["layers"]["norm"]["scale"]),
        (updates["meta_tokens"], gradients["meta_tokens"]),
    ):
        np.testing.assert_array_equal(np.sign(update), -np.sign(gradient))
        np.testing.assert_allclose(np.abs(update), np.abs(update).max(), rtol=1e-3)  # Adam's step after equal gradients
