"""Which pairs a step draws: by weight, every row of a source once an epoch."""

import numpy as np
from ml_collections import ConfigDict

from metaembed_jax.config import load_config
from metaembed_jax.data.mixture import mixture

ALIKE = np.ones((2, 2), int)


def test_a_step_has_sub_batches_of_sources_by_weight():
    """The published mixture, with sources of two sizes."""
    config = load_config("configs/7b.py", {"steps": "300"})
    names, weights, _ = zip(*config.data.sources, strict=True)
    sizes_S2 = np.array([(300, 1000), (900, 3500)])[np.arange(len(names)) % 2]
    steps = mixture(config, [range(1000)] * len(names), sizes_S2)
    drawn = np.array([[reference.source for reference in step] for step in steps]).reshape(300, 12, 32)
    assert (drawn == drawn[:, :, :1]).all()
    counts_S, shares_S = np.bincount(drawn[:, :, 0].ravel()), np.array(weights) / sum(weights)
    np.testing.assert_allclose(counts_S, 3600 * shares_S, atol=3)
    totals = sizes_S2[drawn[:, :, 0]].sum(axis=1)
    assert (totals.max(axis=0) < 1.15 * totals.mean(axis=0)).all()


def test_a_rare_source_of_large_pairs_is_not_starved():
    data = {"sources": (("a", 1.0, 0), ("b", 0.05, 0)), "sub_batch": 0}
    settings = ConfigDict({"seed": 0, "steps": 420, "batch_size": 2, "data": data})
    steps = mixture(settings, [range(9), range(9)], np.array([(100, 0), (3000, 4000)]))
    assert abs(sum(step[0].source for step in steps) - 20) <= 4


def test_no_row_is_left_out_and_a_prefix_does_not_depend_on_what_follows():
    data = {"sources": (("a", 3.0, 0), ("b", 1.0, 0)), "sub_batch": 2}
    settings = ConfigDict({"seed": 0, "steps": 28, "batch_size": 8, "data": data})
    steps = list(mixture(settings, [range(7), range(5)], ALIKE))
    of_a = [reference for step in steps for reference in step if reference.source == 0]
    assert [reference.epoch for reference in of_a] == list(np.repeat(range(24), 7))
    assert all(sorted(row.row for row in of_a[first : first + 7]) == list(range(7)) for first in range(0, 168, 7))
    settings.steps = 3
    assert list(mixture(settings, [range(7), range(5)], ALIKE)) == steps[:3]
