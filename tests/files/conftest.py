"""A bucket in an emulator, for all tests of a process: gcsfs keeps the address that it first saw."""

import pytest

from metaembed_jax.config import load_config
from tests.files.emulator import emulator


@pytest.fixture(scope="session")
def bucket():
    """The environment variables that lead to it."""
    with emulator() as variables:
        yield variables


@pytest.fixture
def small_config(data_dir):
    """The config of tests/training/small.py."""
    return load_config("tests/training/small.py", {"data.dir": str(data_dir)})
