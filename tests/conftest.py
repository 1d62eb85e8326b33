"""What is set before JAX starts, for the whole suite; small data.

Eight fake CPU devices, a TPU's compiler without its host, one compilation cache, no hub; and programs as LLVM makes them without
optimising: the suite compiles for minutes what it then runs for milliseconds.
"""

import os
from pathlib import Path

import jaxtyping
import pytest

import tests.typechecked

# Shapes and types of arrays are checked in every call of these packages and modules. Grain pickles functions of data.mixture, which
# it could not where they are wrapped.
CHECKED = (
    "batch",
    "data.run_items",
    "data.pipeline",
    "data.row_plan",
    "data.source_schedule",
    "data.sizes",
    "encoding",
    "evaluation",
    "inputs",
    "late_interaction",
    "retrieval",
)
jaxtyping.install_import_hook([f"metaembed_jax.{package}" for package in CHECKED], f"{tests.typechecked.__name__}.check")

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# What libtpu would ask of a TPU's host, for compiling without one.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # several processes may compile at once

# Files that take minutes start first: one that starts last would run alone at the end.
LONG = ("test_families", "test_hosts", "test_notebook", "test_mixture_run", "test_run", "test_lora", "test_export")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)


SMALL_FONTS = ("fontawesome6-regular", "codicon")


@pytest.fixture
def unchecked():
    """Let a test pass what the annotations forbid, to see it refused in a line."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def small_fonts(monkeypatch):
    """Prepare about 600 icons instead of 16,000."""
    from metaembed_jax.data.sources import icons

    monkeypatch.setattr(icons, "FONTS", SMALL_FONTS)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Small icons and their boards, prepared."""
    from metaembed_jax.data.sources import boards, icons

    directory = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(icons, "FONTS", SMALL_FONTS)
        boards.prepare(directory)  # prepares the icons too
    return directory


@pytest.fixture(scope="session")
def bucket():
    """Environment variables of a bucket in an emulator: one for all tests, because gcsfs keeps the first address."""
    from tests.files.emulator import emulator

    with emulator() as variables:
        yield variables
