"""Plans of small configs, compiled for slices that are not there."""

import copy
import json
from pathlib import Path

import pytest

pytest.importorskip("libtpu")

from metaembed_jax import cli
from metaembed_jax.config import load_config
from metaembed_jax.errors import UserError
from metaembed_jax.planning import report
from metaembed_jax.planning.chips import CHIPS, topology
from metaembed_jax.planning.measure import check, make_plan
from metaembed_jax.planning.search import candidates, search

ROOT = Path(__file__).parents[2]
SMALL = str(ROOT / "tests" / "training" / "small.py")
TINY = str(ROOT / "configs" / "tiny.py")


@pytest.fixture(scope="module")
def where():
    return topology("v5e:2x2")


@pytest.fixture(scope="module")
def config():
    """`small` with the recipe's adapters, on a mesh that splits batch and weights."""
    config = load_config(SMALL, {"optimizer.algorithm": "adamw", "mesh.data": "2", "mesh.fsdp": "2"})
    config.trained = load_config(str(ROOT / "configs" / "7b.py"), {}).trained
    return config


@pytest.fixture(scope="module")
def plan(config, where):
    return make_plan(config, "train", where)


def test_memory(plan):
    assert plan.fits and 0.99 < plan.spare < 1
    assert all(size > 0 for size in plan.memory.values())
    assert plan.parameters["trained"] == 0


def test_collectives(plan):
    print(plan.ici_bytes)
    assert set(plan.ici_bytes) == {"all-gather", "all-reduce", "reduce-scatter"}


def test_tiny_compiles_for_v5e():
    config = load_config(TINY, {"init_from": "", "mesh.data": "2", "mesh.fsdp": "2", "mesh.tensor": "2"})
    plan = make_plan(config, "train", topology("v5e:2x4"))
    assert plan.fits and plan.devices == 8 and plan.mesh == {"data": 2, "fsdp": 2, "tensor": 2}
