"""The pairs of a step: sources by weight, every row of a source once an epoch."""

import numpy as np
import pytest

from metaembed_jax.config import DataConfig, OptimizerConfig, RowsConfig, RunConfig, ScheduleConfig, load_config, with_keys
from metaembed_jax.data.mixture import mixture
from metaembed_jax.errors import UserError

ALIKE = np.ones((2, 2), int)


def settings_of(sources, sub_batch, batch_size, steps):
    data = DataConfig(sources=sources, sub_batch=sub_batch)
    rows, optimizer = RowsConfig(batch_size=batch_size), OptimizerConfig(warmup_steps=0)
    return RunConfig(data=data, rows=rows, optimizer=optimizer, schedule=ScheduleConfig(steps=steps))


def test_a_step_has_sub_batches_of_sources_by_weight():
    """The published mixture, with sources of two sizes."""
    config = load_config("configs/7b.py", {"schedule.steps": "300", "optimizer.warmup_steps": "0"})
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
    settings = settings_of((("a", 1.0, 0), ("b", 0.05, 0)), sub_batch=0, batch_size=2, steps=420)
    steps = mixture(settings, [range(9), range(9)], np.array([(100, 0), (3000, 4000)]))
    assert abs(sum(step[0].source for step in steps) - 20) <= 4


def test_no_row_is_left_out_and_a_prefix_does_not_depend_on_what_follows():
    settings = settings_of((("a", 3.0, 0), ("b", 1.0, 0)), sub_batch=2, batch_size=8, steps=28)
    steps = list(mixture(settings, [range(7), range(5)], ALIKE))
    of_a = [reference for step in steps for reference in step if reference.source == 0]
    assert [reference.epoch for reference in of_a] == list(np.repeat(range(24), 7))
    assert all(sorted(row.row for row in of_a[first : first + 7]) == list(range(7)) for first in range(0, 168, 7))
    settings = with_keys(settings, {"schedule.steps": 3})
    assert list(mixture(settings, [range(7), range(5)], ALIKE)) == steps[:3]


@pytest.mark.parametrize("rows", [11, 25])
def test_a_step_has_no_pair_twice(rows):
    """Batches of 10 of fewer than twice as many rows share rows at the end of every epoch, if nothing prevents it."""
    settings = settings_of((("a", 1.0, 0),), sub_batch=0, batch_size=10, steps=24)
    steps = [[reference[1:] for reference in step] for step in mixture(settings, [range(rows)], ALIKE[:1])]
    assert all(len({row for _, row in step}) == 10 for step in steps)
    drawn = [reference for step in steps for reference in step]
    for epoch in range(240 // rows):
        assert sorted(drawn[epoch * rows : (epoch + 1) * rows]) == [(epoch, row) for row in range(rows)]
    dataset = mixture(settings, [range(rows)], ALIKE[:1])
    assert [reference[1:] for reference in dataset[23]] == steps[23]  # a run that resumes there


def test_fewer_pairs_than_a_step_takes_are_refused():
    settings = settings_of((("a", 1.0, 0), ("b", 1.0, 0)), sub_batch=4, batch_size=16, steps=20)
    with pytest.raises(UserError, match="source 'b': a step of config.rows.batch_size=16 takes up to 8 pairs of it"):
        mixture(settings, [range(90), range(6)], ALIKE)
