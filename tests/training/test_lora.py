"""Training from a released model: adapters train, the base stays, and a run says which base it stands on."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors.numpy import load_file, save_file

from metaembed_jax.backbones.layers import Linear, quantize
from metaembed_jax.backbones.lora import Lora, LoraConfig, dropout_keys, dropout_mask, dropout_of
from metaembed_jax.backbones.qwen2_5_vl import FAMILY as QWEN2_5_VL
from metaembed_jax.batch.training import put
from metaembed_jax.checkpoints.loading import run_parameters
from metaembed_jax.checkpoints.runs import RunCheckpoints
from metaembed_jax.checkpoints.torch_export import write_model
from metaembed_jax.checkpoints.workdir import create_workdir, is_finished, read_config
from metaembed_jax.config import load_config, with_keys
from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.evaluate_checkpoint import evaluate_checkpoint
from metaembed_jax.mesh import make_mesh
from metaembed_jax.model import MetaEmbed
from metaembed_jax.network import abstract_parameters, init_parameters
from metaembed_jax.network_config import model_config
from metaembed_jax.results import read_results
from metaembed_jax.sharding import named_sharding
from metaembed_jax.training import loop
from metaembed_jax.training.initialize import describe, find_start, initial_state
from metaembed_jax.training.loop import train
from metaembed_jax.training.step import make_trainer
from tests.training.batches import make_dataset


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Qwen2.5-VL directory of random weights."""
    directory = tmp_path_factory.mktemp("base") / "model"
    load_config(f"configs/smoke.py:{directory}")
    return directory


def small(base, data_dir):
    """Four steps of configs/smoke.py, without exports."""
    return with_keys(
        load_config(f"configs/smoke.py:{base}", {"data.dir": str(data_dir)}),
        {
            "schedule.steps": 4,
            "optimizer.warmup_steps": 1,
            "schedule.log_every": 1,
            "evaluation.validate_every": 4,
            "schedule.save_every": 2,
            "schedule.exports": (),
        },
    )


@pytest.fixture
def config(base, data_dir):
    """The config of a run that has not started."""
    return small(base, data_dir)


@pytest.fixture(scope="module")
def finished(base, data_dir, tmp_path_factory):
    """A run that went through, with dropout."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(small(base, data_dir), workdir)
    return workdir


def started(config, workdir, mesh=None):
    """(trainer, state, batches) of a run that starts."""
    config, start = find_start(config)
    trainer = make_trainer(config, mesh or make_mesh(devices=jax.devices()[:1]))
    checkpoints = RunCheckpoints(workdir)
    state = initial_state(config, trainer, checkpoints, start)
    checkpoints.close()
    return trainer, state, make_dataset(config)


def flat(tree):
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(jax.device_get(tree), sep=".").items()}


def test_fresh_adapters_change_nothing(config, base, tmp_path):
    _, state, _ = started(config, tmp_path)
    config = with_keys(config, {"model.embedding_dim": 0, "model.trained": (("*", "full"),)})
    plain = MetaEmbed.from_pretrained(base, dtype="float32", mesh=make_mesh(devices=jax.devices()[:1]))
    plain.parameters["meta_tokens"] = state.parameters["meta_tokens"]
    config = load_config(f"configs/smoke.py:{base}", {"model.embedding_dim": "0"})
    config, _ = find_start(config)
    adapted = {key: value for key, value in state.network_parameters().items() if key != "head"}
    ours = MetaEmbed(model_config(config), adapted, plain.processor, plain.mesh)
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    items = ["cloud snow", {"image": Image.fromarray(image)}, {"text": "lock", "image": Image.fromarray(image)}]
    assert any(path.endswith(".lora.a") for path in flat(adapted))
    np.testing.assert_array_equal(ours.encode_query(items), plain.encode_query(items))
    np.testing.assert_array_equal(ours.encode_document(items), plain.encode_document(items))


def test_a_step_changes_what_trains_and_nothing_else(config, tmp_path):
    trainer, state, dataset = started(config, tmp_path)
    trained, frozen = flat(state.parameters), flat(state.frozen)
    kernels = {path for path in frozen if path.startswith("backbone.layers") and path.endswith("kernel")}
    kernels |= {path for path in frozen if path.startswith("backbone.vision.blocks.mlp") and path.endswith("kernel")}
    adapters = {path.removesuffix("kernel") + f"lora.{half}" for path in kernels for half in "ab"}
    assert set(trained) == adapters | {"meta_tokens", "head.kernel"}
    moments = [leaf.shape for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert sorted(moments) == sorted(2 * [leaf.shape for leaf in trained.values()])
    for step in range(3):  # the first of warm-up moves nothing, the second moves b alone, since b is zero
        state, _ = trainer.step(state, put(dataset[step], trainer.mesh))
    for path, leaf in flat(state.frozen).items():
        np.testing.assert_array_equal(leaf, frozen[path])
    unchanged = [path for path, leaf in flat(state.parameters).items() if np.array_equal(leaf, trained[path])]
    assert not unchanged


def test_start_says_what_trains(config, tmp_path):
    _, state, _ = started(config, tmp_path)
    trained, frozen = (sum(leaf.size for leaf in jax.tree.leaves(part)) for part in (state.parameters, state.frozen))
    assert describe(state).startswith(f"parameters: {trained:,} (") and f"{frozen:,} (" in describe(state)


def trained(workdir, config):
    config, _ = find_start(config)
    checkpoints = RunCheckpoints(workdir)
    parameters = flat(checkpoints.restore_parameters(4, make_trainer(config, make_mesh()).abstract.parameters))
    checkpoints.close()
    return parameters


def test_interrupted_run_ends_as_an_uninterrupted_one(config, finished, tmp_path):
    """The keys of the dropout are a function of the step."""
    assert config.model.lora.dropout > 0
    batches = iter(range(3))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(loop, "put_batch", lambda batch, mesh: (next(batches), put(batch, mesh))[1])
        train(config, tmp_path / "run")
    train(config, tmp_path / "run")
    resumed, expected = trained(tmp_path / "run", config), trained(finished, config)
    for path in expected:
        np.testing.assert_array_equal(resumed[path], expected[path])


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_run_goes_on_with_other_microbatches_and_to_more_steps(config, finished, tmp_path, capsys):
    """It has dropout. It starts with microbatches of 8 rows on eight devices, and ends as if it had one from the first step."""
    run, batches = tmp_path / "run", iter(range(2))
    config = with_keys(config, {"rows.microbatch_rows": 8, "rows.recompute": "nothing", "schedule.save_every": 1})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(loop, "put_batch", lambda batch, mesh: (next(batches), put(batch, mesh))[1])
        train(config, run)
    config = with_keys(config, {"rows.microbatch_rows": 0, "rows.recompute": "layers", "schedule.save_every": 2})
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:  # the end is evaluated once, below
        patch.setattr(loop.Validation, "run", lambda *_: 0.0)
        patch.setattr(loop, "_finish", lambda *_: None)
        train(config, run)
    changes = "rows.microbatch_rows from 8 to 0, rows.recompute from 'nothing' to 'layers', schedule.save_every from 1 to 2"
    assert f"resuming with other settings: {changes}\n" in capsys.readouterr().out
    expected = losses(finished)
    assert list(losses(run)) == list(expected) == [1, 2, 3, 4]
    np.testing.assert_allclose(list(losses(run).values()), list(expected.values()), rtol=1e-6)

    config = with_keys(config, {"schedule.steps": 6})
    train(config, run)
    assert "schedule.steps from 4 to 6; from here on the learning rate is that of a run of 6 steps\n" in capsys.readouterr().out
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rates = {line["step"]: line["learning_rate"] for line in map(json.loads, lines) if "loss" in line}
    np.testing.assert_allclose([rates[step] for step in (4, 5, 6)], np.array([1 / 3, 2 / 5, 1 / 5]) * 1e-3, rtol=1e-5)
    record = json.loads((run / "run.json").read_text())
    assert record["config"]["schedule"]["steps"] == 6 and record["changes"][-1] == {"step": 4, "keys": {"schedule.steps": [4, 6]}}
    assert record["changes"][0]["keys"]["rows.microbatch_rows"] == [8, 0] and set(record["base"]) == {"name", "fingerprint"}
    assert is_finished(run, config) and read_config(run).schedule.steps == 6

    config = with_keys(config, {"schedule.steps": 7})
    assert not is_finished(run, config)
    config = with_keys(config, {"schedule.steps": 5})
    with pytest.raises(UserError, match="config.schedule.steps=5: .*run is at step 6 already; expected at least that many"):
        train(config, run)


def test_a_run_needs_its_own_base(config, base, finished, tmp_path):
    run, moved = shutil.copytree(finished, tmp_path / "run"), shutil.copytree(base, tmp_path / "moved")
    config = with_keys(config, {"init_from": str(moved)})  # the same weights in another place
    config, start = find_start(config)
    create_workdir(run, config, start.tokenizer, start.base, {})

    def record(name):
        stored = json.loads((run / "run.json").read_text())
        stored["base"]["name"] = str(name)
        (run / "run.json").write_text(json.dumps(stored))

    record(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="its base is missing"):
        MetaEmbed.from_pretrained(run)
    record(moved)
    expected = MetaEmbed.from_pretrained(finished, dtype="float32").encode_query(["cloud snow"])
    np.testing.assert_array_equal(MetaEmbed.from_pretrained(run, dtype="float32").encode_query(["cloud snow"]), expected)

    tensors = load_file(moved / "model.safetensors")
    tensors["language_model.norm.weight"][0] += 1
    save_file(tensors, moved / "model.safetensors")
    with pytest.raises(UserError, match="it is another model"):
        MetaEmbed.from_pretrained(run)
    with pytest.raises(UserError, match="is a run on other weights"):
        train(config, run)


def test_evaluation_finds_the_base(config, finished, tmp_path):
    evaluate_checkpoint(config, finished, tmp_path, None)
    assert read_results(tmp_path / "results.json") == read_results(finished / "results.json")
    config = with_keys(config, {"model.lora.alpha": 4.0})
    with pytest.raises(UserError, match="lora.alpha is 32.0 there and 4.0 here"):
        evaluate_checkpoint(config, finished, tmp_path, None)


def test_frozen_kernels_are_evaluated_as_they_were_trained(config, finished):
    config, _ = find_start(config)
    mesh, network = make_mesh(), model_config(config)
    abstract, frozen = abstract_parameters(network, mesh), abstract_parameters(network, mesh, "bfloat16")
    _, parameters = run_parameters(finished, config.model, abstract, frozen)
    assert parameters["backbone"]["layers"]["query"]["kernel"].dtype == "bfloat16"
    assert parameters["head"]["kernel"].dtype == "float32"


def test_a_run_can_start_from_another_with_the_same_base(config, base, finished, tmp_path):
    config = with_keys(config, {"init_from": str(finished)})
    _, state, _ = started(config, tmp_path)
    expected = trained(finished, config)
    for path, leaf in flat(state.parameters).items():
        np.testing.assert_array_equal(leaf, expected[path])
    assert find_start(config)[1].base.name == str(base)


def test_everything_can_train_from_a_released_model(config, base, tmp_path):
    config = with_keys(config, {"model.trained": (("*", "full"),)})
    _, state, _ = started(config, tmp_path)
    expected = flat(MetaEmbed.from_pretrained(base, dtype="float32").parameters["backbone"])
    assert state.frozen == {}
    for path, leaf in flat(state.parameters["backbone"]).items():
        np.testing.assert_array_equal(leaf, expected[path])


def test_checkpoints_hold_what_trained(config, finished):
    config, _ = find_start(config)
    assert set(trained(finished, config)) == set(flat(make_trainer(config, make_mesh()).abstract.parameters))
    stored = json.loads((finished / "run.json").read_text())
    assert set(stored["base"]) == {"name", "fingerprint"}
    size = sum(path.stat().st_size for path in (finished / "checkpoints" / "4" / "parameters").rglob("*") if path.is_file())
    frozen = sum(leaf.size for leaf in jax.tree.leaves(make_trainer(config, make_mesh()).abstract.frozen))
    assert size < 4 * frozen


def test_int8_base_gives_nearly_the_same_losses(config, tmp_path):
    """The model is as wide as `tiny`: rounding averages out less in sums of fewer numbers."""
    network = model_config(load_config("configs/tiny.py"))
    backbone, words = {"backbone": init_parameters(network, seed=0)["backbone"]}, find_start(config)[1].tokenizer
    config = with_keys(config, {"init_from": str(tmp_path), "model.architecture": {}})
    write_model(tmp_path, network, backbone, words, QWEN2_5_VL.Images(28 * 28, 84 * 84, window_size=84), {}, "float32")
    losses, changes = {}, {"schedule.steps": 10, "optimizer.learning_rate": 1e-4, "model.lora.dropout": 0.0}
    config = with_keys(config, changes)  # the recipe's rate, and nothing random
    for dtype in ("bfloat16", "int8"):
        config = with_keys(config, {"model.frozen_dtype": dtype})
        trainer, state, dataset = started(config, tmp_path / f"run_{dtype}")
        assert state.frozen["backbone"]["layers"]["query"]["kernel"].dtype == dtype
        losses[dtype] = []
        for step in range(10):
            state, figures = trainer.step(state, put(dataset[step], trainer.mesh))
            losses[dtype].append(float(figures["loss"]))
    relative = np.array(losses["int8"]) / np.array(losses["bfloat16"]) - 1
    assert 0 < np.abs(relative).mean() < 0.01
    assert np.abs(relative).max() < 0.02  # of random weights; the loss moves by tenths from step to step


def test_quantize_keeps_a_kernel_to_half_a_scale():
    kernel = np.random.default_rng(0).normal(size=(64, 7)).astype(np.float32) * np.logspace(-3, 3, 7, dtype=np.float32)
    kernel[:, 3] = 0
    small, scale = quantize(kernel)
    assert small.dtype == np.int8 and scale.dtype == np.float32
    assert (np.abs(small * scale - kernel) <= 0.5001 * scale).all()
    assert np.abs(small).max(axis=0).tolist() == [127, 127, 127, 0, 127, 127, 127]


def test_adapters_add_their_product_and_drop_their_input():
    linear = Linear(6, 5, axes=(None, None), bias=True, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2000, 6))
    plain = linear(x)
    adapter = Lora(linear, LoraConfig(rank=3, alpha=6.0, dropout=0.25), rngs=nnx.Rngs(2))
    adapter.b[...] = jax.random.normal(jax.random.key(3), (3, 5))
    adapter.items.set_value(jnp.arange(4000))
    linear.lora = nnx.data(adapter)
    product = np.asarray(adapter.a[...]) @ np.asarray(adapter.b[...]) * 2
    kept = linear(jnp.eye(6)[None].repeat(4000, 0)) - linear.bias[...] - linear.kernel[...]
    np.testing.assert_allclose(kept.mean(0), product, atol=0.1 * np.abs(product).max())
    ratios = np.asarray(kept[:, 0, 0]) / product[0, 0]
    np.testing.assert_allclose(np.unique(ratios.round(3)), [0, 1.333], atol=2e-3)
    adapter.key = None
    np.testing.assert_allclose(linear(x) - plain, x @ product, atol=1e-5)


def test_what_is_kept_is_like_chance():
    """Against the binomial: the share, and the likeness to a neighbour in each direction and to other keys' masks."""
    shape, share = (4, 300, 700), 0.9
    masks = {
        (first, second): np.asarray(dropout_mask(jnp.array([first, second], jnp.uint32), jnp.array([0, 1, 2, 77]), share, shape))
        for first in (0, 1, 2**31)
        for second in (0, 1, 77)
    }
    deviation = (share * (1 - share)) ** 0.5
    limit = 5 / np.prod(shape) ** 0.5
    noise = [(mask - share) / deviation for mask in masks.values()]
    pairs = [(first, second) for number, first in enumerate(noise) for second in noise[:number]]
    pairs += [(first, np.roll(first, 1, axis)) for first in noise for axis in range(3)]
    assert max(abs(first.mean()) for first in noise) < limit
    assert max(abs((first * second).mean()) for first, second in pairs) < limit


def test_any_mesh_and_any_microbatch_keep_the_same_of_an_item():
    mesh, shape, items = make_mesh(data=2, fsdp=2, tensor=2), (8, 6, 10), jnp.arange(8)
    key = jnp.array([5, 6], jnp.uint32)
    whole = dropout_mask(key, items, 0.5, shape)
    split = jax.jit(lambda key: dropout_mask(key, items, 0.5, shape), out_shardings=named_sharding(mesh, ("batch", None, "mlp")))
    np.testing.assert_array_equal(split(key), whole)
    np.testing.assert_array_equal(dropout_mask(key, jnp.array([5, 2]), 0.5, (2, 6, 10)), whole[jnp.array([5, 2])])
    tiles = dropout_mask(key, jnp.array([5, 2]), 0.5, (6, 2, 10))  # each item as three tiles of two rows
    np.testing.assert_array_equal(tiles, whole[jnp.array([5, 2])].reshape(6, 2, 10))
    assert dropout_mask(key, items, 1.0, shape).all() and not dropout_mask(key, items, 0.0, shape).any()


def test_every_adapter_and_layer_has_a_key_of_its_own():
    def adapter(*stack):
        return {"key": jax.ShapeDtypeStruct((*stack, 2), jnp.uint32), "items": jax.ShapeDtypeStruct((*stack, 1), jnp.int32)}

    keys = dropout_keys({"a": adapter(3), "b": {"c": adapter()}}, jax.random.key(0))
    rows = np.concatenate([np.asarray(keys["a", "key"]), np.asarray(keys["b", "c", "key"])[None]])
    assert len({tuple(row) for row in rows.tolist()}) == 4
    shapes = jax.tree.map(np.shape, dropout_of(keys, jnp.arange(5)))
    assert shapes == {"a": {"key": (3, 2), "items": (3, 5)}, "b": {"c": {"key": (2,), "items": (5,)}}}
    assert dropout_of(dropout_keys({}, jax.random.key(0)), jnp.arange(5)) == {}


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("model.trained", (("backbone.layers.q.kernel", "lora"),), "the LoRA pattern 'backbone.layers.q.kernel' matches none"),
        ("model.trained", (("meta", "full"),), "'meta' matches none of the parameters"),
        ("model.trained", (("*", "ful"),), r"config.model.trained\[0\]=\('\*', 'ful'\): expected \(a text, 'full' or 'lora'\)"),
        ("model.trained", (("*", "full"), ("backbone.layers.*.kernel", "lora")), "and another pattern gives it an adapter"),
        (
            "model.trained",
            (("meta_tokens", "full"), ("backbone.layers.*.kernel", "lora")),
            "leaves head.kernel frozen, and base weights",
        ),
        (
            "model.trained",
            (("head.kernel", "full"), ("backbone.layers.*.kernel", "lora")),
            "leaves meta_tokens frozen, and base weights",
        ),
        ("model.frozen_dtype", "int4", "config.model.frozen_dtype='int4': expected"),
        ("init_from", "", "is not a Hugging Face directory to read it from"),
        ("init_from", "no/such_model", "no such directory .*, and no such model on the hub"),
    ],
)
def test_what_cannot_train_is_refused(config, tmp_path, key, value, message):
    changes = {key: value} | ({} if value else {"model.architecture": load_config("configs/tiny.py").model.architecture})
    with pytest.raises(UserError, match=message):
        train(with_keys(config, changes), tmp_path / "run")


def test_a_truncated_base_is_named(config, base, tmp_path):
    moved = shutil.copytree(base, tmp_path / "moved")
    content = (moved / "model.safetensors").read_bytes()
    (moved / "model.safetensors").write_bytes(content[: len(content) // 2])
    config = with_keys(config, {"init_from": str(moved)})
    with pytest.raises(UserError, match="model.safetensors cannot be read"):
        train(config, tmp_path / "run")


def test_int8_kernels_cannot_train(config, tmp_path):
    config = with_keys(config, {"model.frozen_dtype": "int8", "model.trained": (("*", "full"),)})
    with pytest.raises(UserError, match="config.model.frozen_dtype=int8, but config.model.trained has backbone"):
        train(config, tmp_path / "run")


def test_another_architecture_than_the_base_is_refused(config, tmp_path):
    config = with_keys(config, {"model.architecture": load_config("configs/tiny.py").model.architecture})
    with pytest.raises(UserError, match="has text_config.vocab_size=512, and config.model.architecture has 2048"):
        train(config, tmp_path / "run")
