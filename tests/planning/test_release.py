"""Release configs on their slices: minutes each. docs/scale.md has the figures."""

from pathlib import Path

import pytest

pytest.importorskip("libtpu")

from metaembed_jax.config import load_config
from metaembed_jax.planning.planner import make_plan
from metaembed_jax.planning.topology import topology

CONFIGS = Path(__file__).parents[2] / "configs"
RELEASES = [
    ("3b", "v5e:2x4"),
    ("3b", "v6e:1x1"),
    ("7b", "v5e:8x8"),
    ("7b", "v5p:2x2x2"),
    ("qwen3_vl_2b", "v5e:2x4"),
    ("qwen3_vl_8b", "v5e:8x8"),
    ("32b", "v5p:4x4x4"),
    ("32b", "v6e:8x8"),
    ("paligemma_3b", "v5e:2x4"),
    ("smolvlm_256m", "v5e:1x1"),
    ("llama_vision_11b", "v5p:2x2x2"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, slice_name", RELEASES)
def test_fits_with_room_to_spare(name, slice_name, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    config = load_config(f"configs/{name}.py")
    plan = make_plan(config, "train", topology(slice_name))
    assert plan.spare >= 0.1 and config.rows.batch_size >= 384 and not plan.arrays
