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
    """The config of small.py."""
    return load_config("tests/training/small.py", {"data.dir": str(data_dir)})
