"""A small model with random weights, for the benchmarks."""

import jax
import pytest

from metaembed_jax.backbones.qwen2_5_vl import FAMILY as QWEN2_5_VL
from metaembed_jax.config import load_config
from metaembed_jax.data import tokenizer
from metaembed_jax.mesh import make_mesh
from metaembed_jax.model import MetaEmbed
from metaembed_jax.network import init_parameters
from metaembed_jax.network_config import model_config


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    config = load_config("tests/training/small.py")
    learned = tokenizer.train(
        ["answer", "text"], tmp_path_factory.mktemp("tokenizer") / "tokenizer.json", QWEN2_5_VL, vocabulary=700
    )
    parameters = init_parameters(model_config(config), 0)
    return MetaEmbed(
        model_config(config),
        parameters,
        QWEN2_5_VL.Processor(learned, QWEN2_5_VL.Images(28 * 28, 84 * 84, window_size=84)),
        make_mesh(devices=jax.devices()[:1]),
    )
