"""The updates of the optimizers on the parameters of a network."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaembed_jax.config import OptimizerConfig, with_keys
from metaembed_jax.errors import UserError
from metaembed_jax.mesh import make_mesh
from metaembed_jax.training.optimizer import learning_rate, make_optimizer, rate_factor
from metaembed_jax.training.step import make_trainer


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


RATES = (("meta_tokens", 10.0), ("*.kernel", 0.5), ("*", 3.0))  # the norms match the last alone
FACTORS = {"layers": {"up": {"kernel": 0.5}, "norm": {"scale": 3.0}}, "meta_tokens": 10.0}


def test_adamw_with_rates_is_adamw_by_hand_with_a_rate_of_each_parameter():
    config = settings(rates=RATES, weight_decay=0.5, clip_norm=1e9)
    optimizer, parameters = make_optimizer(config, 100), tree(0)
    state = optimizer.init(parameters)
    first = second = jax.tree.map(lambda x: np.zeros(x.shape), parameters)
    for step in range(3):
        gradients = tree(1 + step)
        updates, state = optimizer.update(gradients, state, parameters)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * np.float64(g), first, gradients)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * np.float64(g) ** 2, second, gradients)
        bias, rate = (1 - 0.9 ** (step + 1), 1 - 0.999 ** (step + 1)), 1e-2 * step / 10
        for path, update in jax.tree_util.tree_leaves_with_path(updates):
            m, v, x, factor = (functools.reduce(lambda leaf, k: leaf[k.key], path, t) for t in (first, second, parameters, FACTORS))
            decayed = 0.5 * np.float64(x) if path[-1].key == "kernel" else 0.0
            expected = -rate * factor * (m / bias[0] / (np.sqrt(v / bias[1]) + 1e-8) + decayed)
            np.testing.assert_allclose(update, expected, rtol=0, atol=2e-5 * np.abs(expected).max())  # 1 - 0.999 in float32


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_a_rate_is_the_learning_rate_of_its_parameters(algorithm):
    parameters, gradients = tree(0), tree(1)
    config = settings(algorithm=algorithm, weight_decay=0.5)
    updates = updates_of(dataclasses.replace(config, rates=RATES), gradients, parameters, steps=3)
    for pick, factor in ((lambda x: x["meta_tokens"], 10.0), (lambda x: x["layers"]["up"]["kernel"], 0.5)):
        alone = updates_of(dataclasses.replace(config, learning_rate=1e-2 * factor), gradients, parameters, steps=3)
        np.testing.assert_allclose(pick(updates), pick(alone), rtol=2e-6, atol=1e-9)


def test_without_rates_the_optimizer_and_its_state_are_those_of_the_recipe():
    parameters = tree(0)
    plain = make_optimizer(settings(), 100).init(parameters)
    assert len(plain) == 2 and len(make_optimizer(settings(rates=RATES), 100).init(parameters)) == 3


def test_the_pattern_of_a_kernel_is_that_of_its_adapter_too():
    assert rate_factor((("backbone.*.q.kernel", 5.0),), "backbone.layers.q.lora.a") == 5
    assert rate_factor((("*.lora.a", 2.0), ("backbone.*", 5.0)), "backbone.layers.q.lora.a") == 2
    assert rate_factor((("backbone.*.v.kernel", 5.0),), "backbone.layers.q.lora.a") == 1


@pytest.mark.parametrize("pattern", ["heads*", "backbone.visual.*"])
def test_a_pattern_that_matches_no_trained_parameter_is_an_error_before_the_first_step(small_config, pattern):
    trained = (("backbone.layers.*", "full"), ("meta_tokens", "full"), ("head*", "full"))
    config = with_keys(small_config, {"optimizer.rates": ((pattern, 10.0),), "model.trained": trained})
    with pytest.raises(UserError, match=re.escape(f"config.optimizer.rates: {pattern!r} (factor 10) matches none of the trained")):
        make_trainer(config, make_mesh(devices=jax.devices()[:1]))
