"""The layouts in which checkpoints of Qwen3-VL are in circulation."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from metaembed_jax.backbones.qwen3_vl import FAMILY
from metaembed_jax.checkpoints.huggingface import read_backbone
from metaembed_jax.checkpoints.loading import base_architecture
from metaembed_jax.mesh import make_mesh
from metaembed_jax.network import ModelConfig, abstract_parameters
from tests.backbones.qwen3_vl.reference import reference


def read(directory, architecture):
    abstract = abstract_parameters(ModelConfig("qwen3_vl", architecture, dtype="float32"), make_mesh(devices=jax.devices()[:1]))
    return read_backbone(directory, FAMILY, architecture, abstract["backbone"])


def keys(directory):
    return {key for file in directory.glob("*.safetensors") for key in load_file(file)}


@pytest.mark.parametrize("name, tied", [("grouped", False), ("shallow", True)])
def test_layouts_give_the_same(name, tied, tmp_path):
    """Layouts: as released, with the output layer; and as transformers saves a model without it."""
    transformers = pytest.importorskip("transformers")
    directory = reference(name, tmp_path).directory
    _, architecture, _ = base_architecture(directory)
    released = keys(directory)
    assert ("lm_head.weight" in released) == (not tied) and "model.language_model.layers.0.self_attn.q_norm.weight" in released
    transformers.AutoModel.from_pretrained(directory).save_pretrained(tmp_path / "core")
    assert keys(tmp_path / "core") == {key.removeprefix("model.") for key in released} - {"lm_head.weight"}
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path / "core", architecture), read(directory, architecture))


def test_every_tensor_goes_where_it_belongs(tmp_path):
    directory = reference("grouped", tmp_path).directory
    tensors = {key: tensor for file in directory.glob("*.safetensors") for key, tensor in load_file(file).items()}
    backbone = read(directory, base_architecture(directory)[1])
    for path, key in (
        ("layers.query_norm.scale.2", "language_model.layers.2.self_attn.q_norm.weight"),
        ("layers.key_norm.scale.3", "language_model.layers.3.self_attn.k_norm.weight"),
        ("vision.position_table", "visual.pos_embed.weight"),
        ("vision.patch_embedding.bias", "visual.patch_embed.proj.bias"),
        ("vision.blocks.norm2.bias.4", "visual.blocks.4.norm2.bias"),
        ("vision.blocks.mlp.up.bias.1", "visual.blocks.1.mlp.linear_fc1.bias"),
        ("vision.merger.down.bias", "visual.merger.linear_fc2.bias"),
        ("vision.deepstack.norm.scale.0", "visual.deepstack_merger_list.0.norm.weight"),
        ("vision.deepstack.up.bias.1", "visual.deepstack_merger_list.1.linear_fc1.bias"),
    ):
        parameter = backbone
        for key_of_path in path.split("."):
            parameter = parameter[int(key_of_path) if key_of_path.isdigit() else key_of_path]
        np.testing.assert_array_equal(parameter, tensors["model." + key])
    query, key, value = np.split(tensors["model.visual.blocks.3.attn.qkv.weight"], 3)
    for name, kernel in (("query", query), ("key", key), ("value", value)):
        np.testing.assert_array_equal(backbone["vision"]["blocks"][name]["kernel"][3], kernel.T)
