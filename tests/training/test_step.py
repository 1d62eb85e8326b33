"""The step: any mesh, any microbatches and any rows give the same numbers."""

import re

import jax
import numpy as np
import pytest

from metaembed_jax.batch.items import Size
from metaembed_jax.batch.rows import collate
from metaembed_jax.batch.training import StepShape, TrainingBatch, abstract, put
from metaembed_jax.config import load_config, with_keys
from metaembed_jax.mesh import make_mesh
from metaembed_jax.network_config import model_config
from metaembed_jax.training.step import make_trainer
from tests.training.batches import make_dataset, make_plan


@pytest.fixture(scope="module")
def planned(data_dir):
    return make_plan(load_config("tests/training/small.py", {"data.dir": str(data_dir)}))


@pytest.fixture
def dataset(small_config, planned):
    return make_dataset(small_config, planned)


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def eight_devices():
    return make_mesh(2, 2, 2, devices=[jax.devices()[n] for n in (5, 2, 7, 0, 3, 6, 1, 4)])  # any order will do


def relative_norm(a, b):
    difference = jax.tree.map(lambda x, y: np.sum((np.asarray(x, np.float64) - np.asarray(y, np.float64)) ** 2), a, b)
    size = jax.tree.map(lambda x: np.sum(np.asarray(x, np.float64) ** 2), a)
    return (sum(jax.tree.leaves(difference)) / sum(jax.tree.leaves(size))) ** 0.5


def loss_and_gradients(config, mesh, batch):
    trainer = make_trainer(config, mesh)
    parameters = trainer.init().parameters
    with jax.set_mesh(mesh):
        compute = jax.jit(jax.value_and_grad(trainer.loss, has_aux=True))
        (loss, _), gradients = jax.device_get(compute(parameters, {}, put(batch, mesh), 0))
    return loss, gradients


def alone(config, items, step):
    """The pairs of a step with each item in a row of its own."""
    pairs, row = items[step], Size(*items[step].sizes_N3.max(axis=0).tolist())
    numbers = [divmod(number, pairs.items_per_pair) for number in pairs.numbers_N.tolist()]
    row_items = [
        items.row_item(items.read(pairs.references[pair], step), number, pairs.references[pair]) for pair, number in numbers
    ]
    rows = collate([[item] for item in row_items], row, model_config(config).architecture.layout)
    starts_BI = np.arange(len(row_items), dtype=np.int32).reshape(-1, 2) * row.vectors
    return TrainingBatch(
        rows=rows.map(lambda x: x[None]),
        queries=starts_BI[:, 0].copy(),
        documents=starts_BI[:, 1].copy(),
        negative_mask=np.zeros((len(starts_BI), 0), bool),
        source=np.zeros(len(starts_BI), np.int32),
        digests=np.arange(len(row_items) * 2 * row.vectors, dtype=np.int32).reshape(1, -1, 2, row.vectors),
    )


def test_sharded_training_equals_one_device(small_config, dataset):
    losses = {}
    for name, mesh in (("one", one_device()), ("eight", eight_devices())):
        trainer = make_trainer(small_config, mesh)
        state, losses[name] = trainer.init(), []
        for step in range(5):
            state, figures = trainer.step(state, put(dataset[step], mesh))
            losses[name].append(float(figures["loss"]))
    assert len(set(losses["one"])) == 5
    np.testing.assert_allclose(losses["eight"], losses["one"], rtol=1e-4)


def test_any_mesh_microbatches_and_rows_give_the_same_loss_and_gradients(small_config, planned):
    """The cases are eight devices in microbatches of 8 rows, and a row for each item; the loss has terms over the whole batch."""
    items, plan = planned
    terms = {"groups": ((1, 1, 8), (2, 4, 8), (2, 4)), "self_distillation": 0.5, "symmetric": 0.5}
    small_config = with_keys(small_config, {f"objectives.matryoshka.{key}": value for key, value in terms.items()})
    loss, gradients = loss_and_gradients(small_config, one_device(), make_dataset(small_config, planned, shards=1)[0])
    small_config = with_keys(small_config, {"rows.microbatch_rows": 8})
    batch = make_dataset(small_config, planned, shards=4)[0]
    assert batch.rows.tokens.shape[:2] == (-(-plan.rows // 8), 8) and batch.rows.tokens.shape[0] > 1
    others = {"alone": (one_device(), alone(small_config, items, 0)), "sharded": (eight_devices(), batch)}
    for name, (mesh, batch) in others.items():
        other_loss, other_gradients = loss_and_gradients(small_config, mesh, batch)
        np.testing.assert_allclose(other_loss, loss, rtol=1e-6, err_msg=name)
        assert relative_norm(gradients, other_gradients) < 1e-5, name


@pytest.mark.parametrize("dtype, name", [("float32", "f32"), ("bfloat16", "bf16")])
def test_documents_are_gathered_in_the_dtype_of_the_model(small_config, dataset, dtype, name):
    small_config = with_keys(small_config, {"model.dtype": dtype})
    mesh = make_mesh(2, 2, 2, devices=jax.devices()[:8])
    trainer = make_trainer(small_config, mesh)
    program = trainer.step.lower(trainer.abstract, put(dataset[0], mesh)).as_text()
    assert set(re.findall(r"stablehlo.all_gather.*-> tensor<[0-9x]*x(\w+)>", program)) == {name}


def test_the_parts_of_a_step_have_names_for_the_profiler(small_config, dataset):
    trainer = make_trainer(small_config, one_device())
    program = trainer.step.lower(trainer.abstract, put(dataset[0], one_device())).as_text(debug_info=True)
    named = {part for name in re.findall(r'"jit\(step\)/([^"]*)"', program) for part in re.findall(r"\w+", name)}
    assert named >= {"vision", "language", "loss", "optimizer"} and '"gather/all_gather"' in program


@pytest.mark.parametrize("algorithm, moments", [("adamw", 2), ("muon", 1)])
def test_parameters_and_their_moments_are_split_over_the_mesh(small_config, algorithm, moments):
    small_config = with_keys(small_config, {"optimizer.algorithm": algorithm})
    state = make_trainer(small_config, make_mesh(2, 2, 2, devices=jax.devices()[:8])).init()
    kernel = state.parameters["backbone"]["layers"]["mlp"]["gate"]["kernel"]
    layers, width, hidden = kernel.shape
    assert kernel.addressable_shards[0].data.shape == (layers, width // 2, hidden // 2)
    ending = "['backbone']['layers']['mlp']['gate']['kernel']"
    leaves = [x for path, x in jax.tree_util.tree_leaves_with_path(state.optimizer) if jax.tree_util.keystr(path).endswith(ending)]
    assert [x.sharding for x in leaves] == [kernel.sharding] * moments


def test_the_shapes_of_a_batch_are_known_before_it(small_config, dataset):
    mesh, batch = eight_devices(), dataset[0]
    shape = StepShape(
        Size(*(x.shape[-1] for x in (batch.rows.tokens, batch.rows.patch_segments, batch.rows.reads))), *batch.rows.row.shape
    )
    expected = abstract(shape, small_config.rows.batch_size, 0, model_config(small_config).architecture.layout, mesh)
    jax.tree.map(lambda x, leaf: assert_like(x, leaf), put(batch, mesh), expected)


def assert_like(x, leaf):
    assert (x.shape, x.dtype, x.sharding) == (leaf.shape, leaf.dtype, leaf.sharding)
