"""The step: any mesh and any microbatch give the same numbers."""

import re

import jax
import numpy as np
import pytest

from metaembed_jax.checkpoints.loading import run_processor
from metaembed_jax.config import model_config
from metaembed_jax.data import sources
from metaembed_jax.data.pipeline import training_batches
from metaembed_jax.sharding import make_mesh
from metaembed_jax.training.start import find_start
from metaembed_jax.training.step import make_loss, make_trainer, put_batch


@pytest.fixture
def dataset(small_config):
    return make_dataset(small_config)


def make_dataset(config):
    architecture, processor = model_config(config).architecture, run_processor(config, find_start(config).tokenizer)
    return training_batches(config, architecture, processor, sources.training_records(config))


def relative_norm(a, b):
    difference = jax.tree.map(lambda x, y: np.sum((np.asarray(x, np.float64) - np.asarray(y, np.float64)) ** 2), a, b)
    size = jax.tree.map(lambda x: np.sum(np.asarray(x, np.float64) ** 2), a)
    return (sum(jax.tree.leaves(difference)) / sum(jax.tree.leaves(size))) ** 0.5


def gradients(config, mesh, batch):
    trainer = make_trainer(config, mesh)
    parameters = trainer.init().parameters
    with jax.set_mesh(mesh):
        return jax.device_get(jax.jit(jax.grad(trainer.loss, has_aux=True))(parameters, {}, put_batch(batch, mesh), 0)[0])


def test_sharded_training_equals_one_device(small_config, dataset):
    losses = {}
    eight = make_mesh(2, 2, 2, devices=[jax.devices()[n] for n in (5, 2, 7, 0, 3, 6, 1, 4)])  # any order will do
    for name, mesh in (("one", make_mesh(devices=jax.devices()[:1])), ("eight", eight)):
        trainer = make_trainer(small_config, mesh)
        state, losses[name] = trainer.init(), []
        for step in range(5):
            state, figures = trainer.step(state, put_batch(dataset[step], mesh))
            losses[name].append(float(figures["loss"]))
    assert len(set(losses["one"])) == 5
    np.testing.assert_allclose(losses["eight"], losses["one"], rtol=1e-4)


def test_sharded_gradients_equal_one_device(small_config, dataset):
    one = gradients(small_config, make_mesh(devices=jax.devices()[:1]), dataset[0])
    eight = gradients(small_config, make_mesh(2, 2, 2, devices=jax.devices()[:8]), dataset[0])
    assert relative_norm(one, eight) < 1e-5


@pytest.mark.parametrize("dtype, name", [("float32", "f32"), ("bfloat16", "bf16")])
def test_candidates_are_gathered_in_the_dtype_of_the_model(small_config, dataset, dtype, name):
    small_config.dtype = dtype
    mesh = make_mesh(2, 2, 2, devices=jax.devices()[:8])
    trainer = make_trainer(small_config, mesh)
    program = trainer.step.lower(trainer.abstract, put_batch(dataset[0], mesh)).as_text()
    assert set(re.findall(r"stablehlo.all_gather.*-> tensor<[0-9x]*x(\w+)>", program)) == {name}


def test_the_parts_of_a_step_have_names_for_the_profiler(small_config, dataset):
    mesh = make_mesh(devices=jax.devices()[:1])
    trainer = make_trainer(small_config, mesh)
    program = trainer.step.lower(trainer.abstract, put_batch(dataset[0], mesh)).as_text(debug_info=True)
    named = {part for name in re.findall(r'"jit\(step\)/([^"]*)"', program) for part in re.findall(r"\w+", name)}
    assert named >= {"vision", "language", "loss", "optimizer"} and '"gather/all_gather"' in program


@pytest.mark.parametrize("algorithm, moments", [("adamw", 2), ("muon", 1)])
def test_parameters_and_their_moments_are_split_over_the_mesh(small_config, algorithm, moments):
    small_config.optimizer.algorithm = algorithm
    state = make_trainer(small_config, make_mesh(2, 2, 2, devices=jax.devices()[:8])).init()
    kernel = state.parameters["backbone"]["layers"]["mlp"]["gate"]["kernel"]
    layers, width, hidden = kernel.shape
    assert kernel.addressable_shards[0].data.shape == (layers, width // 2, hidden // 2)
    ending = "['backbone']['layers']['mlp']['gate']['kernel']"
    found = [x for path, x in jax.tree_util.tree_leaves_with_path(state.optimizer) if jax.tree_util.keystr(path).endswith(ending)]
    assert [x.sharding for x in found] == [kernel.sharding] * moments


@pytest.mark.parametrize("pairs, tolerance", [(16, 1e-5), (64, 2e-5)])  # what float32 leaves of sums over more pairs
def test_microbatches_equal_the_whole_batch(small_config, pairs, tolerance):
    """Four microbatches of four pairs are one batch of 16, and 16 are one of 64."""
    small_config.batch_size = small_config.microbatch_size = pairs
    microbatch, whole_batch, mesh = 4, make_dataset(small_config)[0], make_mesh(devices=jax.devices()[:1])
    whole = gradients(small_config, mesh, whole_batch)
    small_config.microbatch_size = microbatch

    def cut(group):
        return {key: x.reshape(-1, microbatch, *x.shape[2:]) for key, x in group.items()}

    sides = {side: whole_batch[side] for side in ("query", "candidate")}
    cut_sides = {side: {"groups": tuple(map(cut, part["groups"])), "order": part["order"]} for side, part in sides.items()}
    batch = whole_batch | cut_sides
    assert relative_norm(whole, gradients(small_config, mesh, batch)) < tolerance


def test_order_puts_pairs_together(small_config, dataset):
    """Rows of a side in any order, with the matching `order`, are the same batch."""
    mesh, batch = make_mesh(devices=jax.devices()[:1]), dataset[0]
    loss = jax.jit(make_loss(small_config, mesh))
    parameters = make_trainer(small_config, mesh).init().parameters
    shuffle = np.random.default_rng(0).permutation(small_config.batch_size)
    (group,) = batch["candidate"]["groups"]
    shuffled = {"groups": ({key: x[:, shuffle] for key, x in group.items()},), "order": np.argsort(shuffle).astype(np.int32)}
    expected, _ = loss(parameters, {}, batch, 0)
    found, _ = loss(parameters, {}, batch | {"candidate": shuffled}, 0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
