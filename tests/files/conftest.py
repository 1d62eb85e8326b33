"""The config that other tests train."""

import pytest

from metaembed_jax.config import load_config


@pytest.fixture
def small_config(data_dir):
    """The config of tests/training/small.py."""
    return load_config("tests/training/small.py", {"data.dir": str(data_dir)})
