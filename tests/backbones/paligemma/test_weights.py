"""The layouts of PaliGemma checkpoints in circulation, and the names that stock transformers reads."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from metaembed_jax.backbones.paligemma.weights import UNUSED_KEYS, WEIGHT_MAP, canonical_key, stored_key
from metaembed_jax.checkpoints.export import export
from metaembed_jax.checkpoints.loading import load
from metaembed_jax.mesh import make_mesh
from metaembed_jax.model import MetaEmbed
from tests.backbones.paligemma.record import stock_vectors
from tests.backbones.paligemma.reference import DOCUMENTS, QUERIES, reference

torch = pytest.importorskip("torch")


def names(config):
    """The tensors of a checkpoint as `WEIGHT_MAP` has them."""
    second = config["text_config"]["model_type"] == "gemma2"
    absent = (
        {"layers.mlp_norm.scale"}
        if second
        else {f"layers.{name}.scale" for name in ("attention_post_norm", "mlp_pre_norm", "mlp_post_norm")}
    )
    language, vision = config["text_config"]["num_hidden_layers"], config["vision_config"]["num_hidden_layers"]
    return {
        source.key.format(layer)
        for path, source in WEIGHT_MAP.items()
        if path not in absent
        for layer in range(language if path.startswith("layers") else vision if path.startswith("vision.blocks") else 1)
    }


@pytest.mark.parametrize("name", ["gemma", "gemma2"])
def test_every_layout_has_the_same_names(name, tmp_path):
    from transformers import PaliGemmaForConditionalGeneration

    expected = reference(name, tmp_path)
    expected_names = names(expected.config)
    # As transformers 5 writes it, as it is on the hub, and as models call their parameters, with an output layer and without.
    saved = {key for file in expected.directory.glob("*.safetensors") for key in load_file(file)}
    hub = {key.replace("vision_tower.", "vision_tower.vision_model.") for key in saved}
    model = PaliGemmaForConditionalGeneration.from_pretrained(expected.directory)
    inside, core = dict(model.named_parameters()).keys() | {"lm_head.weight"}, dict(model.model.named_parameters()).keys()
    for layout in (saved, hub, hub | {"language_model.lm_head.weight"}, inside, core):
        assert {canonical_key(key) for key in layout} - set(UNUSED_KEYS) == expected_names


@pytest.mark.parametrize("name", ["gemma", "gemma2"])
def test_stock_transformers_reads_the_names_of_an_export(name, tmp_path):
    from safetensors import torch as torch_files
    from transformers import AutoModel

    expected = reference(name, tmp_path)
    model = AutoModel.from_pretrained(expected.directory)
    tensors = {stored_key(canonical_key(key)): value.contiguous() for key, value in model.state_dict().items()}
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(expected.config))
    torch_files.save_file(tensors, out / "model.safetensors", {"format": "pt"})
    loaded, report = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())


def test_an_export_of_the_first_version_computes_the_same_vectors(tmp_path):
    """That of the second is among the tests of all families."""
    expected = reference("gemma", tmp_path)
    export(expected.directory, tmp_path / "out", "transformers")
    model = MetaEmbed.from_pretrained(expected.directory, dtype="float32")
    np.testing.assert_allclose(stock_vectors(tmp_path / "out", QUERIES, "query"), model.encode_query(QUERIES), atol=1e-5)
    np.testing.assert_allclose(stock_vectors(tmp_path / "out", DOCUMENTS, "document"), model.encode_document(DOCUMENTS), atol=1e-5)


def test_the_released_layout_gives_the_same_parameters(tmp_path):
    expected, mesh = reference("gemma2", tmp_path), make_mesh(devices=jax.devices()[:1])
    released = tmp_path / "released"
    shutil.copytree(expected.directory, released)
    tensors = load_file(released / "model.safetensors")
    renamed = {key.replace("vision_tower.", "vision_tower.vision_model."): tensor for key, tensor in tensors.items()}
    save_file(renamed | {"language_model.lm_head.weight": np.ones((320, 60), np.float32)}, released / "model.safetensors")
    parameters, same = (load(directory, "float32", mesh, 0, 1024)[1] for directory in (released, expected.directory))
    jax.tree.map(np.testing.assert_array_equal, parameters, same)
