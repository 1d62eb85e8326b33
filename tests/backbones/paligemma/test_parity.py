"""Directories saved by transformers, against transformers' own forward pass, on unit vectors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer

from metaembed_jax.backbones import paligemma
from metaembed_jax.checkpoints.huggingface import read_backbone, read_json
from metaembed_jax.inputs.examples import ShapeClass, collate
from metaembed_jax.sharding import make_mesh, parameter_shardings
from tests.backbones.paligemma.reference import CANDIDATES, CONFIGURATIONS, QUERIES, reference

TOLERANCE = dict(rtol=0, atol=1e-5)


def load(directory):
    config = paligemma.Config.from_huggingface(read_json(directory / "config.json"))
    preprocessor = (
        read_json(directory / "preprocessor_config.json")
        if (directory / "preprocessor_config.json").is_file()
        else read_json(directory / "processor_config.json")["image_processor"]
    )
    config = config.with_preprocessor(preprocessor, directory)
    backbone = nnx.eval_shape(lambda: paligemma.Backbone(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(backbone)
    wanted = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        nnx.to_pure_dict(state),
        parameter_shardings(make_mesh(devices=jax.devices()[:1]), state),
    )
    parameters = read_backbone(directory, paligemma, config, wanted)
    images = paligemma.Images.from_preprocessor(preprocessor, config, 1024)
    processor = paligemma.Processor(Tokenizer.from_file(str(directory / "tokenizer.json")), images)
    return config, nnx.merge(graph, parameters), processor


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_vectors(name, tmp_path):
    expected = reference(name, tmp_path)
    config, backbone, processor = load(expected.directory)
    for side, items in (("query", QUERIES), ("candidate", CANDIDATES)):
        process = getattr(processor, side)
        examples = [process({"text": item} if isinstance(item, str) else item) for item in items]
        batch = collate(examples, ShapeClass(80, config.patch_multiple), config.layout)
        keep = 16 if side == "query" else 64
        states = jax.jit(functools.partial(backbone, keep=keep, dtype=jnp.float32, checkpoint=False, unroll=1))(
            batch, expected.meta_tokens[: 16 if side == "query" else 80]
        )
        states = np.asarray(states)
        ours = states / np.linalg.norm(states, axis=-1, keepdims=True)
        print(name, side, np.abs(ours - getattr(expected, side)).max())
        np.testing.assert_allclose(ours, getattr(expected, side), **TOLERANCE)
