"""Tests of all families: strict loading, export to stock transformers and back, any mesh, adapters, FLOPs, the TPU's compiler."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from metaembed_jax.backbones.family import FAMILIES, family
from metaembed_jax.backbones.lora import dropout_keys, dropout_of
from metaembed_jax.batch.items import Size
from metaembed_jax.batch.training import StepShape, put
from metaembed_jax.checkpoints.export import export
from metaembed_jax.checkpoints.huggingface import read_backbone
from metaembed_jax.checkpoints.loading import base_architecture, run_processor
from metaembed_jax.checkpoints.runs import RunCheckpoints
from metaembed_jax.config import RunConfig, with_keys
from metaembed_jax.data.pipeline import training_batches
from metaembed_jax.data.row_plan import plan_rows
from metaembed_jax.data.run_items import run_items
from metaembed_jax.encoding.reading import as_item
from metaembed_jax.errors import UserError
from metaembed_jax.flops import train_flops
from metaembed_jax.mesh import make_mesh
from metaembed_jax.model import MetaEmbed
from metaembed_jax.network import abstract_network
from metaembed_jax.network_config import model_config, row_limits
from metaembed_jax.planning.compiling import compile_program
from metaembed_jax.planning.programs import encode_program, train_program
from metaembed_jax.training.initialize import find_start, initial_state
from metaembed_jax.training.loop import train
from metaembed_jax.training.microbatches import encode
from metaembed_jax.training.step import make_trainer
from tests.backbones.families import record
from tests.checkpoints.runs import save_noise
from tests.encoding.small_rows import with_small_rows
from tests.planning.tracing import traced_flops
from tests.products import equations, products, rounded, rounded_in_kernels


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """The family, its record, and the directory of its small model."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    stored, directory = record(request.param), tmp_path_factory.mktemp(request.param) / "model"
    stored.write(directory)
    return SimpleNamespace(family=family(request.param), record=stored, directory=directory)


@pytest.fixture(scope="module")
def ours(case):
    """The vectors of its items, with fresh Meta Tokens."""
    return vectors(case, case.directory)


def vectors(case, directory):
    model = MetaEmbed.from_pretrained(directory, dtype="float32", mesh=make_mesh(devices=jax.devices()[:1]))
    model = with_small_rows(model, case.record.tokens + 80, case.record.patches)
    return {"query": model.encode_query(case.record.queries), "document": model.encode_document(case.record.documents)}


def assert_same(encoded, expected, tolerance):
    for side in ("query", "document"):
        np.testing.assert_allclose(encoded[side], expected[side], atol=tolerance)


def tensors(directory):
    return {key: tensor for file in sorted(directory.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def test_every_tensor_must_be_there_and_no_other(case, tmp_path):
    _, architecture, _ = base_architecture(case.directory)
    whole = tensors(case.directory)

    shutil.copy(case.directory / "config.json", tmp_path)  # says whether the embedding table is the output layer

    def read(changed):
        save_file(changed, tmp_path / "model.safetensors")
        return read_backbone(tmp_path, case.family, architecture, {})

    read(whole)
    kinds = {re.sub(r"\.\d+\.", ".{}.", key): key for key in whole}  # one tensor of each
    used = sorted(key for key in kinds.values() if case.family.canonical_key(key) not in case.family.unused_keys)
    for key in used[::4]:
        with pytest.raises(UserError, match=re.escape(case.family.canonical_key(key))):
            read({name: tensor for name, tensor in whole.items() if name != key})
        with pytest.raises(UserError, match=rf"{re.escape(key)} has shape .* config.json asks for"):
            read(whole | {key: whole[key][..., None]})
    with pytest.raises(UserError, match="some.other.weight of shape .* is not a tensor of this model"):
        read(whole | {"some.other.weight": np.ones(3, np.float32)})


def test_names_of_tensors_and_back(case):
    for source in case.family.weight_map.values():
        assert case.family.canonical_key(case.family.stored_key(source.key)) == source.key


def test_stock_transformers_computes_the_vectors_of_an_export(case, ours, tmp_path):
    export(case.directory, tmp_path / "one", "transformers")
    items = {"query": case.record.queries, "document": case.record.documents}
    assert_same({side: case.record.vectors(tmp_path / "one", items[side], side) for side in items}, ours, 1e-4)

    assert_same(vectors(case, tmp_path / "one"), ours, 1e-5)
    export(tmp_path / "one", tmp_path / "two", "transformers")
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one)
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_model_card_says_how_to_compute_them(case, tmp_path):
    export(case.directory, tmp_path / "out", "transformers")
    card = (tmp_path / "out" / "README.md").read_text()
    program = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    known = {"DIRECTORY": str(tmp_path / "out")}
    exec(program, known)
    model = with_small_rows(MetaEmbed.from_pretrained(tmp_path / "out", dtype="float32"))
    np.testing.assert_allclose(known["vectors"].detach().numpy(), model.encode_query(["a red car"]), atol=1e-4)


def test_peft_computes_the_vectors_of_a_run_as_its_card_says(case, tmp_path):
    pytest.importorskip("peft")
    save_noise(training_config(case, case.record.patches), tmp_path / "run")
    for kind in ("peft", "transformers"):  # the second for its vocabulary and its images
        export(tmp_path / "run", tmp_path / kind, kind)
    known = {"DIRECTORY": str(tmp_path / "peft")}
    exec(re.search(r"```python\n(.*?)```", (tmp_path / "peft" / "README.md").read_text(), re.DOTALL)[1], known)
    rows, about = known["table"].weight.data, json.loads((tmp_path / "transformers" / "config.json").read_text())["metaembed"]
    assert len(rows) == known["first"] + 80
    rows[about["first_token"] : about["first_token"] + 80] = rows[known["first"] :].clone()  # to where that vocabulary has them
    model, items = known["model"].base_model.model.eval(), {"query": case.record.queries, "document": case.record.documents}
    encoded = {side: case.record.vectors(tmp_path / "transformers", items[side], side, model) for side in items}
    assert_same(encoded, vectors(case, tmp_path / "run"), 1e-4)


def test_sentence_transformers_computes_them_or_is_refused(case, ours, tmp_path):
    if case.family.sentence_transformers is None:
        with pytest.raises(UserError, match=f"there is no module for {case.family.title} models; use --format=transformers"):
            export(case.directory, tmp_path / "out", "sentence-transformers")
        config = training_config(case, case.record.patches)
        config, _ = find_start(config)
        config = with_keys(config, {"schedule.exports": ("sentence-transformers",)})
        with pytest.raises(UserError, match="there is no module"):  # better before the first step than after the last
            train(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return
    module = pytest.importorskip("sentence_transformers")
    export(case.directory, tmp_path / "out", "sentence-transformers")
    model = module.MultiVectorEncoder(str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    queries, documents = model.encode_query(list(case.record.queries)), model.encode_document(list(case.record.documents))
    assert_same({"query": np.stack(queries), "document": np.stack(documents)}, ours, 1e-4)


def test_eight_devices_give_what_one_gives(case, ours):
    model = MetaEmbed.from_pretrained(case.directory, dtype="float32", mesh=make_mesh(2, 2, 2))
    encoded = with_small_rows(model, case.record.tokens + 80, case.record.patches).encode_document(case.record.documents)
    np.testing.assert_allclose(encoded, ours["document"], atol=1e-5)


def training_config(case, patches):
    """Adapters on the small model; queries are texts, documents both."""
    small = case.record
    return with_keys(
        RunConfig(),
        {
            "init_from": str(case.directory),
            "model.dtype": "float32",
            "model.trained": small.lora,
            "model.lora.rank": 4,
            "model.lora.dropout": 0.0,
            "data.sources": (("noise", 1.0, 0),),
            "rows.size": (small.tokens + 80, patches),
            "data.min_pixels": small.pixels[0],
            "data.max_pixels": small.pixels[1],
            "rows.batch_size": 8,
            "schedule.steps": 3,
            "optimizer.warmup_steps": 0,
            "optimizer.learning_rate": 1e-4,
            "objectives.matryoshka.temperature": 0.15,
        },
    )


def batches_of(config, tokenizer, records, shards=1):
    """The batches of a run on one source."""
    items = run_items(config, run_processor(config, tokenizer), [records])
    shape = plan_rows(items, row_limits(config)).shape(config.rows.microbatch_rows, shards)
    return training_batches(items, shape, model_config(config).architecture.layout)


def test_three_steps_train_every_adapter_and_nothing_else(case, tmp_path):
    config = training_config(case, case.record.patches)
    config, start = find_start(config)
    trainer = make_trainer(config, make_mesh(devices=jax.devices()[:1]))
    checkpoints = RunCheckpoints(tmp_path)
    state = initial_state(config, trainer, checkpoints, start)
    checkpoints.close()
    frozen = jax.device_get(state.frozen)
    documents = map(as_item, case.record.documents)
    records = [{"query": {"text": f"number {number}"}, "positive": item} for number, item in enumerate(documents)]
    dataset, losses = batches_of(config, start.tokenizer, records), []
    for step in range(config.schedule.steps):
        state, figures = trainer.step(state, put(dataset[step], trainer.mesh))
        losses.append(float(figures["loss"]))
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.frozen), frozen)
    adapters = {path: x for path, x in flatten_dict(jax.device_get(state.parameters), sep=".").items() if path.endswith(".lora.b")}
    assert adapters
    for path, b in adapters.items():  # they start at zero: one that gradients do not reach stays there
        assert np.abs(b).reshape(len(b), -1).max(axis=1).min() > 0, path


def test_dropout_belongs_to_a_row_wherever_it_is(case):
    """Steps with an adapter on every kernel, in two microbatches, and in an order in which rows change microbatch and position."""
    config = training_config(case, case.record.patches)
    config, start = find_start(config)
    config = with_keys(
        config,
        {
            "model.trained": (("*", "full"), ("backbone.*.kernel", "lora")),
            "model.lora.dropout": 0.5,
            "rows.microbatch_rows": 4,
            "rows.unroll_layers": 1,
        },
    )
    graph, shapes, abstract = abstract_network(model_config(config, training=True))
    noise = np.random.default_rng(0)
    flat = flatten_dict(nnx.to_pure_dict(shapes), sep=".")
    parameters = {path: (noise.normal(size=x.shape) * 0.1 + path.endswith("scale")).astype(np.float32) for path, x in flat.items()}
    keys = dropout_keys(nnx.to_pure_dict(abstract), jax.random.key(0))

    @jax.jit
    def encoded(parameters, rows):
        tree = unflatten_dict(parameters, sep=".")
        return encode(lambda row: nnx.merge(graph, tree, dropout_of(keys, row)), rows, "everything", "float32")

    records = [{"query": {"text": "x"}, "positive": as_item(item)} for item in case.record.documents]
    rows = batches_of(config, start.tokenizer, records)[0].rows
    count = rows.tokens.shape[0] * rows.tokens.shape[1]
    assert len(rows.tokens) > 1
    order = np.random.default_rng(1).permutation(count)
    is_read = (rows.reads > 0).reshape(count, -1)
    expected = encoded(parameters, rows)
    mixed = encoded(parameters, rows.map(lambda x: x.reshape(count, *x.shape[2:])[order].reshape(x.shape)))
    np.testing.assert_allclose(mixed[np.argsort(order)][is_read], expected[is_read], atol=1e-5)
    others = encoded(parameters, dataclasses.replace(rows, row=rows.row + 1))
    assert (np.abs(others - expected).max(axis=2)[is_read] > 1e-3).all()


@pytest.mark.parametrize(
    "trained, recompute, microbatch", [("lora", "everything", 2), ("full", "nothing", 0), ("meta_tokens", "layers", 2)]
)
def test_flops_equal_what_jax_traces(case, trained, recompute, microbatch):
    """The branches of a conditional count as often as they run."""
    config = training_config(case, case.record.patches)
    config, _ = find_start(config)
    tables = {"lora": case.record.lora, "full": (("*", "full"),), "meta_tokens": (("meta_tokens", "full"),)}
    config = with_keys(config, {"model.trained": tables[trained], "rows.recompute": recompute, "rows.microbatch_rows": microbatch})
    shape = StepShape(Size(*config.rows.size, 128), 2 if microbatch else 1, microbatch or 3)
    assert sum(train_flops(config, shape)) == pytest.approx(traced_flops(config, shape), rel=1e-9)  # shares are not exact


def test_no_chip_rounds_a_float32_product(case):
    """The products of a step with adapters and a kernel that Muon trains, and of encoding."""
    config = training_config(case, case.record.patches)
    config = with_keys(
        config,
        {
            "model.trained": (*case.record.lora, ("backbone.vision.patch_embedding.kernel", "full")),
            "optimizer.algorithm": "muon",
            "rows.microbatch_rows": 4,
        },
    )
    config, _ = find_start(config)
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        for traced in (train_program(config, mesh).trace(), encode_program(config, mesh).trace()):
            kernels = [equation for equation in equations(traced.jaxpr.jaxpr) if equation.primitive.name == "pallas_call"]
            assert kernels and not rounded_in_kernels(traced.jaxpr.jaxpr)
            for platform in ("tpu", "cuda"):
                text = traced.lower(lowering_platforms=(platform,)).as_text()
                assert len(products(text)) > 30 and not rounded(text)


def test_a_tpu_compiles_its_step(case):
    pytest.importorskip("libtpu")
    config = training_config(case, case.record.patches)
    config, _ = find_start(config)
    config = with_keys(config, {"model.dtype": "bfloat16"})
    program = compile_program(train_program, config, "v6e:1x1")
    assert not program.error and program.text.startswith("HloModule")
