"""The key table, in all layouts in circulation."""

import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from metaembed_jax.backbones.llama_vision.config import Config
from metaembed_jax.backbones.llama_vision.network import Backbone
from metaembed_jax.backbones.llama_vision.weights import WEIGHT_MAP, canonical_key, stored_key
from metaembed_jax.errors import UserError
from tests.backbones.llama_vision.reference import CONFIGURATIONS, read, reference


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directory of a checkpoint in one file, and its tensors."""
    directory = reference("irregular", tmp_path_factory.mktemp("references")).directory
    return directory, load_file(directory / "model.safetensors")


def rewritten(saved, out, tensors):
    shutil.copytree(saved[0], out)
    save_file(tensors, out / "model.safetensors")
    return out


def flat(model):
    return jax.tree.leaves_with_path(model.parameters["backbone"])


def as_in_memory(key):
    """`MllamaForConditionalGeneration`, by its own names."""
    if key == "language_model.lm_head.weight":
        return "lm_head.weight"
    return "model." + key.replace("language_model.model.", "language_model.")


def test_the_saved_layout_is_the_released_one(saved):
    """The names that the published checkpoints have."""
    for key in (
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.self_attn.q_proj.weight",
        "language_model.model.layers.2.cross_attn.k_norm.weight",
        "language_model.model.layers.2.cross_attn_attn_gate",
        "multi_modal_projector.bias",
        "vision_model.gated_positional_embedding.tile_embedding.weight",
        "vision_model.global_transformer.layers.0.gate_ffn",
        "vision_model.patch_embedding.weight",
    ):
        assert key in saved[1]


@pytest.mark.parametrize("rename", [as_in_memory, canonical_key])
def test_every_layout_gives_the_same_parameters(saved, tmp_path, rename):
    """Layouts of a model with its output layer, and without."""
    tensors = {rename(key): tensor for key, tensor in saved[1].items() if rename is as_in_memory or "lm_head" not in key}
    expected, parameters = (flat(read(directory)) for directory in (saved[0], rewritten(saved, tmp_path / "new", tensors)))
    assert len(parameters) == len(WEIGHT_MAP)
    for (path, ours), (_, theirs) in zip(parameters, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("language_model.model.layers.2.cross_attn_mlp_gate"),
        lambda tensors: tensors.pop("vision_model.pre_tile_positional_embedding.gate"),
        lambda tensors: tensors.update({"language_model.model.layers.5.self_attn.q_proj.weight": np.zeros((96, 96), np.float32)}),
        lambda tensors: tensors.update({"language_model.model.layers.1.cross_attn_attn_gate": np.zeros(1, np.float32)}),
        lambda tensors: tensors.update(
            {
                "language_model.model.layers.2.self_attn.q_proj.weight": tensors.pop(
                    "language_model.model.layers.2.cross_attn.q_proj.weight"
                )
            }
        ),
        lambda tensors: tensors.update({"vision_model.class_embedding": np.zeros(41, np.float32)}),
    ],
)
def test_a_tensor_too_many_too_few_or_misplaced_is_named(saved, tmp_path, change):
    tensors = dict(saved[1])
    change(tensors)
    with pytest.raises(UserError, match=r"layers\.\d\.|gate|class_embedding"):
        read(rewritten(saved, tmp_path / "new", tensors))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_table_writes_what_transformers_has(name):
    """Every tensor of its model, with its shape."""
    transformers = pytest.importorskip("transformers")
    config = Config.from_huggingface(CONFIGURATIONS[name])
    with pytest.importorskip("torch").device("meta"):
        model = transformers.MllamaModel(transformers.MllamaConfig(**CONFIGURATIONS[name]))
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    backbone = nnx.eval_shape(lambda: Backbone(config, rngs=nnx.Rngs(0)))
    shapes = {}
    for path, leaf in jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(backbone))):
        source = WEIGHT_MAP[".".join(entry.key for entry in path)]
        stacked = "{}" in source.key
        for layer in range(leaf.shape[0] if stacked else 1):
            shapes[stored_key(source.name(config, layer))] = source.shape(leaf.shape[stacked:])
    assert shapes == expected
