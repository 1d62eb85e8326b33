"""The public model: loading, encoding, and its errors."""

import copy as copying
import dataclasses
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

import metaembed_jax as me
from metaembed_jax.backbones import layers
from metaembed_jax.checkpoints import base_weights, loading
from metaembed_jax.checkpoints.runs import RunCheckpoints
from metaembed_jax.config import MatryoshkaConfig, ModelSettings, ObjectivesConfig, RunConfig
from metaembed_jax.config.record import to_record
from metaembed_jax.mesh import make_mesh
from metaembed_jax.network import init_parameters
from metaembed_jax.network_config import model_config
from tests.backbones.qwen2_5_vl.reference import noise, write_tokenizer
from tests.checkpoints.huggingface_files import SMALL, random_tensors, write
from tests.encoding.small_rows import with_small_rows

ITEMS = ["a red car", noise(60, 90, 1), {"text": "where", "image": noise(150, 60, 2)}, "another " * 12, {"text": "b"}]


def one_device():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write(tmp_path_factory.mktemp("huggingface"), random_tensors())


@pytest.fixture(scope="module")
def model(directory):
    return with_small_rows(me.MetaEmbed.from_pretrained(directory, dtype="float32", mesh=one_device()))


def edit(directory, file, **changes):
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def copy(directory, tmp_path):
    return shutil.copytree(directory, tmp_path / "copy")


def test_items_keep_their_order_and_do_not_see_each_other(model):
    together = model.encode_document(ITEMS)
    assert (together.shape, together.dtype) == ((5, 64, 32), np.float32)
    np.testing.assert_allclose(np.linalg.norm(together, axis=-1), 1, atol=1e-5)
    alone = np.concatenate([model.encode_document([item]) for item in ITEMS])
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-6)
    backwards = model.encode_document([*ITEMS[::-1], ITEMS[0]])
    np.testing.assert_allclose(backwards[:-1][::-1], together, rtol=0, atol=1e-6)
    np.testing.assert_allclose(backwards[-1], together[0], rtol=0, atol=1e-6)


def test_weights_that_do_not_fit_are_divided(directory, model, monkeypatch):
    for share, fsdp in ((0.5, 1), (1, 2), (2, 4), (100, 8)):
        monkeypatch.setattr(loading, "device_memory", lambda share=share: int(model.weight_bytes / share))
        assert loading.default_mesh(directory, "float32").shape == {"data": 8 // fsdp, "fsdp": fsdp, "tensor": 1}
    divided = me.MetaEmbed.from_pretrained(directory, dtype="float32")
    assert divided.mesh.shape["fsdp"] == 8 and divided.weight_bytes < model.weight_bytes / 4


def test_eight_devices_give_what_one_gives(directory, model):
    spread = with_small_rows(me.MetaEmbed.from_pretrained(directory, dtype="float32", mesh=make_mesh(2, 2, 2)))
    np.testing.assert_allclose(spread.encode_query(ITEMS[:2]), model.encode_query(ITEMS[:2]), atol=1e-5)


def test_documents_of_a_folder(model, tmp_path):
    ITEMS[1].save(tmp_path / "10.png")
    ITEMS[2]["image"].save(tmp_path / "9.png")
    documents = me.open_documents(tmp_path)
    expected = model.encode_document([ITEMS[2]["image"], ITEMS[1]])
    np.testing.assert_array_equal(model.encode_document(documents), expected)


def test_images_may_be_encoded_bytes(model):
    buffer = io.BytesIO()
    ITEMS[1].save(buffer, "PNG")
    encoded = model.encode_document([{"image": buffer.getvalue()}])
    np.testing.assert_array_equal(encoded, model.encode_document([ITEMS[1]]))


def test_similarity_is_maxsim(model):
    q, c = model.encode_query(ITEMS[:1]), model.encode_document(ITEMS)
    expected = np.einsum("qid,njd->qnij", q[:, :4], c[:, :8]).max(-1).sum(-1)
    np.testing.assert_allclose(model.similarity(q, c, budget=(4, 8)), expected, rtol=1e-5)
    np.testing.assert_allclose(me.maxsim(q, c, budget=(4, 8)), expected, rtol=1e-5)


def test_vectors_that_are_no_numbers_are_refused(model):
    meta_tokens = model.parameters["meta_tokens"].at[0].set(np.nan)
    broken = me.MetaEmbed(model.config, model.parameters | {"meta_tokens": meta_tokens}, model.processor, model.mesh)
    with pytest.raises(me.UserError, match="item 0: its vectors hold NaN or infinities"):
        broken.encode_query(["a", "b"])


def test_what_is_too_large_is_made_smaller(model, capsys):
    processor = copying.copy(model.processor)
    processor.images = dataclasses.replace(processor.images, max_pixels=1024 * 784)
    other = me.MetaEmbed(model.config, model.parameters, processor, model.mesh)
    vectors = other.encode_document(["another " * 3000, noise(900, 900, 3), "short"])
    assert (other.reduced.items, other.reduced.cut, other.reduced.shrunk) == (3, 1, 1) and vectors.shape == (3, 64, 32)
    assert "document: of 3 items, 1 texts cut and 1 images shrunk to fit a row" in capsys.readouterr().err
    np.testing.assert_allclose(vectors[2], model.encode_document(["short"])[0], rtol=0, atol=1e-6)
    assert not model.reduced


def test_nothing_to_encode(model):
    assert model.encode_query([], budget=2).shape == (0, 2, 32)


@pytest.mark.parametrize("items", ["a text", {"text": "one item"}, Image.new("RGB", (30, 30)), iter(["a", "b"])])
def test_one_item_instead_of_a_list(model, items):
    with pytest.raises(me.UserError, match="put a single item in a list"):
        model.encode_query(items)


@pytest.mark.parametrize(
    "item, message", [(3, "not int"), ({}, "item 1 has neither"), ({"image": b"x"}, "item 1: .*cannot be read")]
)
def test_bad_items_are_named(model, item, message):
    with pytest.raises(me.UserError, match=message):
        model.encode_query(["fine", item])


@pytest.mark.parametrize("budget", [0, -1, 17])
def test_budgets_beyond_the_model(model, budget):
    with pytest.raises(me.UserError, match=f"budget={budget}: expected 1 to 16 query"):
        model.encode_query(["a"], budget=budget)


def test_fresh_meta_tokens(directory, model):
    """Their scale is the config's initializer_range; one seed gives the same tokens on any mesh."""
    assert (model.meta_tokens.shape, model.meta_tokens.dtype) == ((80, 32), np.float32)
    assert abs(model.meta_tokens.std() - SMALL["text_config"]["initializer_range"]) < 0.01
    again = me.MetaEmbed.from_pretrained(directory, mesh=make_mesh(2, 2, 2))
    np.testing.assert_array_equal(again.meta_tokens, model.meta_tokens)
    other = me.MetaEmbed.from_pretrained(directory, mesh=one_device(), seed=1)
    assert np.abs(other.meta_tokens - model.meta_tokens).min(axis=1).max() > 0


def test_bfloat16_is_close(directory, model):
    narrow = with_small_rows(me.MetaEmbed.from_pretrained(directory, mesh=one_device()))
    assert narrow.config.dtype == "bfloat16"
    cosines = np.sum(narrow.encode_query(ITEMS[:2]) * model.encode_query(ITEMS[:2]), axis=-1)
    assert cosines.min() > 0.99


def test_the_preprocessor_sets_mean_and_size(directory, tmp_path):
    changed = copy(directory, tmp_path)
    edit(
        changed,
        "preprocessor_config.json",
        image_mean=[0.5, 0.25, 0.75],
        image_std=[1, 2, 3],
        min_pixels=None,
        size={"shortest_edge": 784},
    )
    model = me.MetaEmbed.from_pretrained(changed, max_visual_tokens=9)
    vision = model.config.architecture.vision_config
    assert (vision.image_mean, vision.image_std) == ((0.5, 0.25, 0.75), (1.0, 2.0, 3.0))
    assert (model.processor.images.min_pixels, model.processor.images.max_pixels) == (784, 9 * 784)


def make_run(directory):
    """Write the folder of a run, with a best step that is not the last."""
    architecture = {key: SMALL[key] for key in ("text_config", "vision_config")}
    config = RunConfig(
        model=ModelSettings(architecture=architecture, query_tokens=4, document_tokens=8, embedding_dim=24, dtype="float32"),
        objectives=ObjectivesConfig(matryoshka=MatryoshkaConfig(groups=((1, 1), (4, 8)))),
    )
    directory.mkdir()
    write_tokenizer(directory)
    (directory / "run.json").write_text(json.dumps({"config": to_record(config)}))
    checkpoints = RunCheckpoints(directory)
    parameters = [init_parameters(model_config(config), seed) for seed in (1, 2)]
    for step, (saved, metric) in enumerate(zip(parameters, (0.9, 0.1), strict=True)):
        checkpoints.save(step, saved, {"count": jnp.zeros(())}, metric)
    checkpoints.close()
    return config, parameters[0]


def test_a_run(tmp_path):
    config, parameters = make_run(tmp_path / "run")
    model = me.MetaEmbed.from_pretrained(tmp_path / "run", dtype="float32", mesh=one_device())
    jax.tree.map(np.testing.assert_array_equal, model.parameters, parameters)
    assert model.config == model_config(config)
    assert model.encode_query(["a"]).shape == (1, 4, 24)
    narrow = me.MetaEmbed.from_pretrained(tmp_path / "run", max_visual_tokens=16)
    assert narrow.config == dataclasses.replace(model_config(config), dtype="bfloat16")
    assert (narrow.parameters["head"]["kernel"].dtype, narrow.parameters["meta_tokens"].dtype) == ("bfloat16", "float32")
    assert narrow.processor.images.max_pixels == 16 * 784

    (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(me.UserError, match="has no checkpoints"):
        me.MetaEmbed.from_pretrained(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_hub_id(directory, monkeypatch):
    asked = []
    monkeypatch.setattr(
        base_weights,
        "snapshot_download",
        lambda name, **patterns: asked.append((name, patterns["allow_patterns"])) or str(directory),
    )
    assert me.MetaEmbed.from_pretrained("someone/some-model").meta_tokens.shape == (80, 32)
    assert asked == [("someone/some-model", ["*.safetensors", "*.json"])]

    def offline(name, **patterns):
        raise LocalEntryNotFoundError("cannot be reached\nand more")

    monkeypatch.setattr(base_weights, "snapshot_download", offline)
    with pytest.raises(me.UserError, match=r"^runs/tniy: .*no such directory.*\(cannot be reached\)$"):
        me.MetaEmbed.from_pretrained("runs/tniy")


@pytest.mark.parametrize("name", ["/no/such/directory", "a b", "../gone"])
def test_a_path_that_does_not_exist(name):
    with pytest.raises(me.UserError, match="no such directory"):
        me.MetaEmbed.from_pretrained(name)


def test_a_directory_without_a_preprocessor_is_refused(directory, tmp_path):
    changed = copy(directory, tmp_path)
    (changed / "preprocessor_config.json").unlink()
    with pytest.raises(me.UserError, match="has no preprocessor_config.json, which says how images are read"):
        me.MetaEmbed.from_pretrained(changed)


def test_what_does_not_fit_together_is_refused(directory, tmp_path):
    def refused(message, file, **changes):
        changed = copy(directory, tmp_path)
        edit(changed, file, **changes)
        with pytest.raises(me.UserError, match=message) as caught:
            me.MetaEmbed.from_pretrained(changed)
        assert "\n" not in str(caught.value)
        shutil.rmtree(changed)

    text, vision = SMALL["text_config"], SMALL["vision_config"]
    refused("model_type='llama': expected idefics3, mllama", "config.json", model_type="llama")
    refused("token 301, .* 100 rows", "config.json", text_config=text | {"vocab_size": 100})
    refused("num_hidden_layers is None; expected a positive integer", "config.json", text_config=text | {"num_hidden_layers": None})
    refused("mrope_section", "config.json", text_config=text | {"rope_parameters": {"mrope_section": [1, 1, 1]}})
    refused(
        "rope_type is 'yarn'",
        "config.json",
        text_config=text | {"rope_parameters": text["rope_parameters"] | {"rope_type": "yarn"}},
    )
    refused("use_sliding_window", "config.json", text_config=text | {"use_sliding_window": True})
    refused("out_hidden_size is 31", "config.json", vision_config=vision | {"out_hidden_size": 31})
    refused("patch and merge sizes", "preprocessor_config.json", patch_size=16)
    refused("image_std is .*; expected three positive numbers", "preprocessor_config.json", image_std=[1, 0, 1])
    refused("rescale_factor is 1", "preprocessor_config.json", rescale_factor=1.0)
    refused("rescale_factor is None", "preprocessor_config.json", rescale_factor=None)
    refused("image_mean is .*; expected three numbers", "preprocessor_config.json", image_mean=[0, float("nan"), 0])
    refused("patch_size is '14'; expected a positive integer", "preprocessor_config.json", patch_size="14")
    refused("size is 'large'; expected an object", "preprocessor_config.json", size="large")
    refused("size is 784; expected an object", "preprocessor_config.json", size=784)
    refused("shortest_edge is -1; expected a positive integer", "preprocessor_config.json", size={"shortest_edge": -1})
    refused("config.json: model_type=\\['llama'\\]: expected", "config.json", model_type=["llama"])
    refused("config.json: model_type=\\['llamallama.* \\.\\.\\. .*'\\]: expected", "config.json", model_type=["llama" * 9999])
    refused("vision_config is 'x'; expected an object", "config.json", vision_config="x")
    refused("num_hidden_layers is 0; expected a positive integer", "config.json", text_config=text | {"num_hidden_layers": 0})
    refused("hidden_size is 32.0; expected a positive integer", "config.json", text_config=text | {"hidden_size": 32.0})
    refused("rms_norm_eps is '1e-6'; expected a positive number", "config.json", text_config=text | {"rms_norm_eps": "1e-6"})
    refused(
        "fullatt_block_indexes is '1'; expected a list of integers",
        "config.json",
        vision_config=vision | {"fullatt_block_indexes": "1"},
    )
    refused("1000000 layers; expected at most", "config.json", vision_config=vision | {"depth": 10**6})
    (tmp_path / "empty").mkdir()
    with pytest.raises(me.UserError, match="neither a run .* nor a Hugging Face model"):
        me.MetaEmbed.from_pretrained(tmp_path / "empty")
    with pytest.raises(me.UserError, match="dtype='float16'"):
        me.MetaEmbed.from_pretrained(directory, dtype="float16")


def test_deep_models_do_not_cut_their_last_layer_off(model, monkeypatch):
    """Cutting it off saves memory, and changes no number."""
    items = ["a red car", {"image": noise(60, 100, 1)}]
    expected = model.encode_document(items)
    monkeypatch.setattr(layers, "FEW_LAYERS", 0)
    vectors = me.MetaEmbed(model.config, model.parameters, model.processor, model.mesh).encode_document(items)
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
