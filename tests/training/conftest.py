"""The icons, prepared once a session, and a config of `tiny` shrunk to seconds."""

import pytest

from metaembed_jax.config import load_config
from metaembed_jax.data import sources


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with the prepared icons."""
    directory = tmp_path_factory.mktemp("data")
    sources.prepare("icons", directory)
    return directory


@pytest.fixture
def small_config(data_dir):
    """`tiny`, narrow and with small batches; eight steps."""
    config = load_config("configs/tiny.py", {})
    config.data.dir = str(data_dir)
    text, vision = config.architecture.text_config, config.architecture.vision_config
    text.hidden_size, text.intermediate_size, text.mrope_section = 32, 64, (2, 3, 3)
    vision.hidden_size, vision.intermediate_size, vision.out_hidden_size = 32, 64, 32
    config.embedding_dim, config.unroll_layers, config.temperature = 16, 1, 0.03
    config.batch_size = config.microbatch_size = 16
    config.steps, config.optimizer.warmup_steps, config.log_every = 8, 2, 1
    config.validate_every, config.save_every = 8, 2
    config.mesh.data = -1
    return config
