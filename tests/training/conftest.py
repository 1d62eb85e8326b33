"""A config of `tiny` shrunk to seconds."""

import pytest

from metaembed_jax.config import load_config


@pytest.fixture
def small_config(data_dir):
    """The config of small.py."""
    return load_config("tests/training/small.py", {"data.dir": str(data_dir)})
