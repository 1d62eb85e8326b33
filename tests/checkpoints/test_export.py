"""Other libraries compute the same vectors from the exports of a trained LoRA run, without this package."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from metaembed_jax.checkpoints.card import model_card
from metaembed_jax.checkpoints.export import export
from metaembed_jax.checkpoints.runs import RunCheckpoints
from metaembed_jax.checkpoints.torch_export import write_model
from metaembed_jax.config import load_config, with_keys
from metaembed_jax.errors import UserError
from metaembed_jax.mesh import make_mesh
from metaembed_jax.model import MetaEmbed
from metaembed_jax.network_config import model_config
from metaembed_jax.training.initialize import find_start, initial_state
from metaembed_jax.training.loop import train
from metaembed_jax.training.step import make_trainer
from tests.backbones.qwen2_5_vl.record import stock_vectors
from tests.checkpoints.runs import save_noise


def noise(height, width, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


TALL, WIDE = noise(150, 90, 1), noise(60, 200, 2)
ITEMS = ["cloud snow", TALL, {"text": "a lock", "image": WIDE}, "", "漢字 é", {"image": WIDE}]


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir):
    """Two LoRA runs: one with a head, trained and evaluated; one without, whose adapters are as large as noise can make them."""
    folder = tmp_path_factory.mktemp("export")

    def config_of(width):
        overrides = {"data.dir": str(data_dir), "schedule.steps": "4", "optimizer.warmup_steps": "1", "model.embedding_dim": width}
        config = load_config(f"configs/smoke.py:{folder / 'base'}", overrides)
        return with_keys(config, {"schedule.exports": ()})

    train(config_of("16"), folder / "head")
    save_noise(config_of("0"), folder / "plain")
    return {name: folder / name for name in ("head", "plain")}


@pytest.fixture(scope="module")
def ours(run):
    """The vectors of ITEMS of both sides."""

    def vectors(directory):
        model = MetaEmbed.from_pretrained(directory, dtype="float32")
        return {"query": model.encode_query(ITEMS), "document": model.encode_document(ITEMS)}

    return {name: vectors(directory) for name, directory in run.items()}


@pytest.mark.parametrize("name, dtype", [("head", "float32"), ("plain", "float32"), ("head", "bfloat16")])
def test_our_own_loader_reads_the_transformers_export_and_writes_it_again(run, ours, tmp_path, name, dtype):
    export(run[name], tmp_path / "one", "transformers", dtype)
    model = MetaEmbed.from_pretrained(tmp_path / "one", dtype="float32")
    tolerance = 1e-5 if dtype == "float32" else 0.05
    np.testing.assert_allclose(model.encode_query(ITEMS), ours[name]["query"], atol=tolerance)
    np.testing.assert_allclose(model.encode_document(ITEMS), ours[name]["document"], atol=tolerance)

    export(tmp_path / "one", tmp_path / "two", "transformers")
    files = {path.name for path in (tmp_path / "one").iterdir()}
    assert files == {path.name for path in (tmp_path / "two").iterdir()} and ("head.safetensors" in files) == (name == "head")
    for file in (file for file in files if file.endswith(".safetensors")):
        first, second = (load_file(tmp_path / part / file) for part in ("one", "two"))
        assert first.keys() == second.keys()
        for key in first:
            np.testing.assert_array_equal(second[key], first[key])
    for file in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        assert json.loads((tmp_path / "one" / file).read_text()) == json.loads((tmp_path / "two" / file).read_text())


def test_a_directory_that_older_transformers_wrote_keeps_its_dtype(run, tmp_path):
    export(run["head"], tmp_path / "one", "transformers", "bfloat16")
    stored = json.loads((tmp_path / "one" / "config.json").read_text())
    stored["torch_dtype"] = stored.pop("dtype")
    (tmp_path / "one" / "config.json").write_text(json.dumps(stored))
    export(tmp_path / "one", tmp_path / "two", "transformers")
    assert json.loads((tmp_path / "two" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["head", "plain"])
def test_stock_transformers_computes_the_same_vectors(run, ours, tmp_path, name):
    pytest.importorskip("torch")
    export(run[name], tmp_path / "out", "transformers")
    for side in ("query", "document"):
        actual = stock_vectors(tmp_path / "out", ITEMS, side)
        np.testing.assert_allclose(actual, ours[name][side], atol=1e-4)


@pytest.mark.parametrize("name", ["head", "plain"])
def test_sentence_transformers_computes_the_same_vectors_and_scores(run, ours, tmp_path, name):
    module = pytest.importorskip("sentence_transformers")
    export(run[name], tmp_path / "out", "sentence-transformers")
    model = module.MultiVectorEncoder(str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    queries, documents = model.encode_query(ITEMS), model.encode_document(ITEMS)
    np.testing.assert_allclose(np.stack(queries), ours[name]["query"], atol=1e-4)
    np.testing.assert_allclose(np.stack(documents), ours[name]["document"], atol=1e-4)
    scores = MetaEmbed.from_pretrained(run[name]).similarity(ours[name]["query"], ours[name]["document"])
    np.testing.assert_allclose(model.similarity(queries, documents), scores, atol=1e-3)
    assert model.get_embedding_dimension() == ours[name]["query"].shape[-1]
    for odd in ({}, {"text": None}, {"text": "x", "img": TALL}, {"text": 5}, None, [{"role": "user", "content": "hi"}]):
        with pytest.raises(ValueError, match="cannot embed"):
            model[0].preprocess([odd])


def test_sentence_transformers_saves_what_it_holds(run, tmp_path):
    module = pytest.importorskip("sentence_transformers")
    export(run["head"], tmp_path / "out", "sentence-transformers")
    model = module.MultiVectorEncoder(str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    model[0].head.data.mul_(-1).add_(1)
    model[0].core.get_input_embeddings().weight.data.add_(0.1)
    model.save(str(tmp_path / "saved"))
    saved = module.MultiVectorEncoder(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    np.testing.assert_array_equal(np.stack(saved.encode_query(ITEMS)), np.stack(model.encode_query(ITEMS)))


def test_peft_does_not_store_parameters_that_train_in_full(run, tmp_path, data_dir):
    overrides = {"data.dir": str(data_dir), "schedule.steps": "4", "optimizer.warmup_steps": "1"}
    config = load_config(f"configs/smoke.py:{run['plain'].parent / 'base'}", overrides)
    config = with_keys(
        config,
        {
            "schedule.exports": ("transformers", "peft"),
            "model.trained": (*config.model.trained, ("backbone.vision.merger_*", "full")),
        },
    )
    message = r"--format=peft: backbone\.vision\.merger_.* trains in full, and PEFT stores only adapters"
    with pytest.raises(UserError, match=message):  # better before the first step than after the last
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    save_noise(config, tmp_path / "run")
    with pytest.raises(UserError, match=message):
        export(tmp_path / "run", tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_a_run_starts_from_the_transformers_export_with_its_meta_tokens_and_head(run, tmp_path, data_dir):
    export(run["head"], tmp_path / "one", "transformers")
    config = load_config(f"configs/smoke.py:{tmp_path / 'one'}", {"data.dir": str(data_dir)})
    actual = started(config, tmp_path / "a")
    expected = MetaEmbed.from_pretrained(run["head"], dtype="float32").parameters
    np.testing.assert_array_equal(actual["meta_tokens"], expected["meta_tokens"])
    np.testing.assert_array_equal(actual["head"]["kernel"], expected["head"]["kernel"])
    config = with_keys(config, {"model.embedding_dim": 8})
    assert started(config, tmp_path / "b")["head"]["kernel"].shape == (32, 8)
    config = with_keys(config, {"model.query_tokens": 40, "model.document_tokens": 80})
    with pytest.raises(UserError, match="has query_tokens=16, and config.model has 40"):
        started(config, tmp_path / "c")


def started(config, workdir):
    """The parameters that train of a run at its first step."""
    config, start = find_start(config)
    trainer = make_trainer(config, make_mesh())
    checkpoints = RunCheckpoints(workdir)
    state = initial_state(config, trainer, checkpoints, start)
    checkpoints.close()
    return jax.device_get(state.parameters)


WRONG = [
    ({"first_token": 3}, "config.json has <|meta_query_0|> as token 3, and tokenizer.json as"),
    ({"query_tokens": 8}, "has <|meta_document_0|> as token 311, and tokenizer.json as 319"),
    ({"query_tokens": 10**12}, "more than tokenizer.json has tokens"),
    ({"embedding_dim": 0}, "embedding_dim of config.json is 0, and head.safetensors is there"),
    ({"embedding_dim": 8}, r"asks for weight of shape \(8, 32\)"),
    ({"first_token": None}, "expected non-negative integers query_tokens"),
    (None, "expected non-negative integers query_tokens"),
]


def test_a_wrong_record_of_meta_tokens_is_refused(run, tmp_path):
    export(run["head"], tmp_path, "transformers")
    stored = json.loads((tmp_path / "config.json").read_text())
    for change, message in WRONG:
        metadata = None if change is None else stored["metaembed"] | change
        (tmp_path / "config.json").write_text(json.dumps(stored | {"metaembed": metadata}))
        with pytest.raises(UserError, match=message):
            MetaEmbed.from_pretrained(tmp_path)


def test_large_models_are_written_in_shards(run, tmp_path):
    model = MetaEmbed.from_pretrained(run["plain"], dtype="float32")
    parameters = {key: value for key, value in model.parameters.items() if key != "head"}
    images = model.processor.images
    write_model(tmp_path, model.config, parameters, run["plain"] / "tokenizer.json", images, {}, "float32", shard_bytes=50_000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    actual = MetaEmbed.from_pretrained(tmp_path, dtype="float32")
    np.testing.assert_allclose(actual.encode_query(ITEMS), model.encode_query(ITEMS), atol=1e-5)


def test_every_export_has_a_card(run, tmp_path):
    for kind in ("transformers", "sentence-transformers", "peft"):
        export(run["head"], tmp_path / kind, kind)
        card = (tmp_path / kind / "README.md").read_text()
        assert "1:1, 2:4, 4:8, 8:16, 16:64" in card and "## Load" in card and "| 16:64 |" in card
    assert 'states @ others["head"].T' in card  # of the last one, peft
    assert not list(tmp_path.glob("*.part"))


def test_what_cannot_be_exported_is_refused(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(UserError, match="full is not empty"):
        export(run["head"], tmp_path / "full", "transformers")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    export(run["head"], tmp_path / "merged", "transformers")
    with pytest.raises(UserError, match="has no adapters"):
        export(tmp_path / "merged", tmp_path / "adapter", "peft")
    assert not list(tmp_path.glob("adapter*"))
    with pytest.raises(UserError, match="--format=onnx"):
        export(run["head"], tmp_path / "other", "onnx")


def test_a_card_of_a_run_without_a_temperature():
    metadata = {"name": "x", "groups": [[1, 1]], "steps": 1234, "sources": [["icons", 1.0, 0]]}
    network = model_config(load_config("tests/training/small.py"))
    assert "- trained for 1,234 steps on: icons\n" in model_card("transformers", network, metadata, None)
    assert "1,234 steps at temperature 0.1 on: icons" in model_card("peft", network, metadata | {"temperature": 0.1}, None)


def test_a_card_of_a_run_with_widths():
    metadata = {"groups": [[1, 1], [16, 64, 8], [16, 64]], "steps": 1, "sources": []}
    card = model_card("transformers", model_config(load_config("tests/training/small.py")), metadata, None)
    assert "- budgets (query vectors : document vectors x numbers of a vector): 1:1, 16:64x8, 16:64\n" in card
    assert "cut to its first numbers is divided by the length" in card
