"""Reading of Hugging Face directories: every tensor goes where it belongs, and what does not fit is refused by name."""

import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from metaembed_jax.checkpoints.base_weights import open_base
from metaembed_jax.checkpoints.loading import load
from metaembed_jax.errors import UserError
from metaembed_jax.mesh import make_mesh
from metaembed_jax.network import abstract_network
from metaembed_jax.sharding import parameter_shardings
from tests.checkpoints.huggingface_files import new_layout, random_tensors, write

TENSORS = random_tensors()


def read(directory, dtype="float32", mesh=None):
    return load(directory, dtype, mesh or make_mesh(devices=jax.devices()[:1]), 0, 1024)[1]["backbone"]


def halves(tensors):
    keys = sorted(tensors)
    return {key: tensors[key] for key in keys[::2]}, {key: tensors[key] for key in keys[1::2]}


def assert_equal_trees(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_every_tensor_goes_where_it_belongs(tmp_path):
    backbone = read(write(tmp_path, TENSORS))
    for layer in range(2):
        for ours, theirs in (
            ("query", "self_attn.q_proj"),
            ("key", "self_attn.k_proj"),
            ("value", "self_attn.v_proj"),
            ("output", "self_attn.o_proj"),
        ):
            np.testing.assert_array_equal(
                backbone["layers"][ours]["kernel"][layer], TENSORS[f"model.layers.{layer}.{theirs}.weight"].T
            )
        np.testing.assert_array_equal(
            backbone["layers"]["key"]["bias"][layer], TENSORS[f"model.layers.{layer}.self_attn.k_proj.bias"]
        )
        np.testing.assert_array_equal(
            backbone["layers"]["mlp_norm"]["scale"][layer], TENSORS[f"model.layers.{layer}.post_attention_layernorm.weight"]
        )
    for block in range(3):
        fused = TENSORS[f"visual.blocks.{block}.attn.qkv.weight"].reshape(3, 32, 32)
        biases = TENSORS[f"visual.blocks.{block}.attn.qkv.bias"].reshape(3, 32)
        for number, name in enumerate(("query", "key", "value")):
            np.testing.assert_array_equal(backbone["vision"]["blocks"][name]["kernel"][block], fused[number].T)
            np.testing.assert_array_equal(backbone["vision"]["blocks"][name]["bias"][block], biases[number])
    kernel = TENSORS["visual.patch_embed.proj.weight"]
    ours = np.asarray(backbone["vision"]["patch_embedding"]["kernel"]).reshape(3, 14, 14, 32)
    np.testing.assert_allclose(ours, (kernel[:, :, 0] + kernel[:, :, 1]).transpose(1, 2, 3, 0), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(backbone["embedding"], TENSORS["model.embed_tokens.weight"])


def test_layouts_and_splits_give_the_same(tmp_path):
    expected = read(write(tmp_path / "one", TENSORS))
    tied = {key: tensor for key, tensor in TENSORS.items() if key != "lm_head.weight"}
    assert_equal_trees(read(write(tmp_path / "new", new_layout(TENSORS))), expected)
    assert_equal_trees(read(write(tmp_path / "split", *halves(TENSORS))), expected)
    assert_equal_trees(read(write(tmp_path / "tied", *halves(new_layout(tied)))), expected)


def test_parameters_lie_on_the_mesh_by_the_rules(tmp_path):
    directory, mesh = write(tmp_path, TENSORS), make_mesh(2, 2, 2)
    config, parameters, _ = load(directory, "float32", mesh, 0, 1024)
    shardings = parameter_shardings(mesh, abstract_network(config)[1])
    assert jax.tree.map(lambda x, sharding: x.sharding == sharding, parameters, shardings) == jax.tree.map(
        lambda _: True, shardings
    )
    assert not parameters["backbone"]["layers"]["query"]["kernel"].sharding.is_fully_replicated
    assert_equal_trees(parameters, load(directory, "float32", make_mesh(devices=jax.devices()[:1]), 0, 1024)[1])


def test_dtypes(tmp_path):
    """Files of 16 bits are read exactly; bfloat16 is for kernels and the vocabulary, norms stay float32."""
    stored = {key: tensor.astype(ml_dtypes.bfloat16) for key, tensor in TENSORS.items()}
    directory = write(tmp_path, stored)
    wide, narrow = read(directory), read(directory, "bfloat16")
    query = stored["model.layers.1.self_attn.q_proj.weight"].T
    for backbone, dtype in ((wide, "float32"), (narrow, "bfloat16")):
        kernel = backbone["layers"]["query"]["kernel"]
        assert (kernel.dtype, backbone["embedding"].dtype, backbone["final_norm"]["scale"].dtype) == (dtype, dtype, "float32")
        np.testing.assert_array_equal(np.asarray(kernel[1], np.float32), query.astype(np.float32))


def refused(directory, *parts):
    with pytest.raises(UserError) as caught:
        read(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(".*".join(map(re.escape, parts)), message), message


def without(*keys):
    return {key: tensor for key, tensor in TENSORS.items() if key not in keys}


def test_a_missing_tensor(tmp_path):
    key = "visual.blocks.2.attn.qkv.bias"
    refused(write(tmp_path, without(key)), str(tmp_path), key, "(96,)", "vision.blocks.key.bias", "(3, 32)")


def test_a_tied_table_that_is_stored_as_the_output_layer(tmp_path):
    """As `safetensors` leaves it of two names of one tensor."""
    table = "model.embed_tokens.weight"
    tensors = without(table) | {"lm_head.weight": TENSORS[table]}
    refused(write(tmp_path / "untied", tensors), str(tmp_path), table, "is in none of its safetensors files")
    for name, where in (("root", {"tie_word_embeddings": True}), ("text", {"text_config": {"tie_word_embeddings": True}})):
        directory = write(tmp_path / name, tensors)
        config = json.loads((directory / "config.json").read_text())
        where = where if name == "root" else {"text_config": config["text_config"] | where["text_config"]}
        stored = {**config, "tie_word_embeddings": False} if name == "text" else config
        (directory / "config.json").write_text(json.dumps(stored | where))
        assert_equal_trees(read(directory), read(write(tmp_path / "whole", TENSORS)))


@pytest.mark.parametrize("extra", ["model.layers.2.input_layernorm.weight", "visual.merger.mlp.1.weight", "something"])
def test_a_tensor_too_many(tmp_path, extra):
    refused(write(tmp_path, TENSORS | {extra: np.zeros((5, 7), np.float32)}), "model.safetensors", extra, "(5, 7)")


def test_a_tensor_twice(tmp_path):
    key = "model.norm.weight"
    new = "model.language_model.norm.weight"
    refused(write(tmp_path / "names", TENSORS | {new: TENSORS[key]}), "model.safetensors", "is stored twice", "(32,)", "(32,)")
    first, second = without(key), {key: TENSORS[key], "model.embed_tokens.weight": TENSORS["model.embed_tokens.weight"]}
    directory = write(tmp_path / "files", first, second)
    (directory / "model.safetensors.index.json").unlink()
    refused(
        directory,
        "model-00002-of-00002.safetensors",
        "model.embed_tokens.weight",
        "is stored twice",
        "(320, 32)",
        "model-00001-of-00002.safetensors",
    )


@pytest.mark.parametrize(
    "key, shape, wanted",
    [
        ("model.layers.1.mlp.down_proj.weight", (72, 32), "(32, 72)"),
        ("visual.blocks.0.attn.qkv.weight", (32, 96), "(96, 32)"),
        ("visual.patch_embed.proj.weight", (32, 3, 1, 14, 14), "(32, 3, 2, 14, 14)"),
        ("model.embed_tokens.weight", (321, 32), "(320, 32)"),
    ],
)
def test_a_tensor_of_another_shape(tmp_path, key, shape, wanted):
    refused(write(tmp_path, TENSORS | {key: np.zeros(shape, np.float32)}), "model.safetensors", key, str(shape), wanted)


def test_quantised_weights(tmp_path):
    key = "model.layers.0.mlp.up_proj.weight"
    refused(write(tmp_path, TENSORS | {key: np.zeros((72, 32), np.int8)}), "model.safetensors", key, "I8")


def test_a_base_is_read_as_strictly(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for tensor, message in ((np.zeros((2, 2), np.int8), "a is I8"), (np.zeros((0, 2), np.float32), "which is empty")):
        save_file({"a": tensor}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=message):
            open_base(str(tmp_path))
    write(tmp_path, TENSORS)
    same = open_base(str(write(tmp_path / "parts", *halves(TENSORS)))).fingerprint
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "parts" / "config.json").write_text(json.dumps(stored | {"transformers_version": "1"}))
    assert same == open_base(str(tmp_path)).fingerprint == open_base(str(tmp_path / "parts")).fingerprint
    changed = TENSORS["model.embed_tokens.weight"].copy()
    changed[20:50] += 1
    assert same != open_base(str(write(tmp_path / "changed", TENSORS | {"model.embed_tokens.weight": changed}))).fingerprint
    for name in ("~nobody_here/model", "x" * 300):
        with pytest.raises(UserError, match="no such directory"):
            open_base(name)


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/other.safetensors", "..\\other.safetensors", "..", "sub/x.safetensors", "weights.bin"]
)
def test_an_index_never_leads_out_of_the_directory(tmp_path, name):
    write(tmp_path / "other", TENSORS)
    directory = write(tmp_path / "model", TENSORS, index=dict.fromkeys(TENSORS, name))
    refused(directory, "model.safetensors.index.json", repr(name))


def test_an_index_that_disagrees_with_its_files(tmp_path):
    first, second = halves(TENSORS)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = dict.fromkeys(first, names[0]) | dict.fromkeys(second, names[1])
    key = min(first)
    refused(write(tmp_path / "a", first, second, index=index | {"phantom": names[1]}), names[1], "lacks phantom")
    refused(write(tmp_path / "b", first, second, index=index | {key: names[1]}), names[0], "does not list", key)
    refused(write(tmp_path / "c", first, second, index={name: file for name, file in index.items() if name != key}), names[0], key)
    refused(
        write(tmp_path / "d", first, second, index=dict.fromkeys(TENSORS, "gone.safetensors")), "gone.safetensors", "cannot be read"
    )
    refused(write(tmp_path / "e", first, second, index=["a"]), "weight_map")


def test_files_that_are_not_weights(tmp_path):
    directory = write(tmp_path, TENSORS)
    file = directory / "model.safetensors"
    content = file.read_bytes()
    for broken in (b"", b"{}", content[: len(content) // 2]):
        file.write_bytes(broken)
        refused(directory, str(file), "cannot be read")
    file.unlink()
    refused(directory, str(directory), "no *.safetensors")
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refused(directory, str(directory), "pytorch_model.bin is a pickle")


def test_one_file_and_an_index_side_by_side(tmp_path):
    write(tmp_path, TENSORS)
    refused(write(tmp_path, *halves(TENSORS)), "both model.safetensors and model.safetensors.index.json")
