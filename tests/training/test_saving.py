"""When a run saves, by a clock that the test turns."""

import json

import pytest

from metaembed_jax.checkpoints.runs import RunCheckpoints
from metaembed_jax.errors import UserError
from metaembed_jax.training import loop
from metaembed_jax.training.loop import train
from metaembed_jax.training.saving import Saves


class Clock:
    """Seconds, turned by hand."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


def test_a_save_is_due_by_steps_and_by_the_clock():
    clock = Clock()
    saves = Saves(4, 1.5, clock)
    assert [step for step in range(1, 10) if saves.due(step)] == [4, 8]
    clock.seconds += 89
    assert not saves.due(9)
    clock.seconds += 1
    assert saves.due(9) and saves.due(10)  # until it is done
    saves.begin()
    assert not saves.due(11)
    clock.seconds += 60
    saves.begin()  # for another reason
    clock.seconds += 60
    assert not saves.due(13)


def test_without_minutes_the_clock_has_no_say():
    clock = Clock()
    saves = Saves(4, 0.0, clock)
    clock.seconds += 1e9
    assert not saves.due(3) and saves.due(4)


def test_a_run_saves_by_the_clock(small_config, tmp_path, monkeypatch):
    """A clock on which every step takes four minutes; stopped before the end, which would be evaluated."""
    clock, batches = Clock(), iter(range(7))

    def put(batch, mesh, original=loop.put_batch):
        clock.seconds += 240
        next(batches)
        return original(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", put)
    monkeypatch.setattr(loop, "Saves", lambda steps, minutes: Saves(steps, minutes, clock))
    small_config.save_every, small_config.keep_checkpoints, small_config.save_minutes = 100, 9, 11.5
    with pytest.raises(StopIteration):
        train(small_config, tmp_path / "run")
    checkpoints = RunCheckpoints(tmp_path / "run", keep=9)
    assert checkpoints.steps() == [6, 3]
    checkpoints.close()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["seconds/compile"] > 0 == lines[1]["seconds/compile"]
    assert lines[-1]["flops_per_second"] > 0 and lines[-1]["seconds_left"] > 0 and "mfu" not in lines[-1]


def test_minutes_below_zero_are_refused(small_config, tmp_path):
    small_config.save_minutes = -1.0
    with pytest.raises(UserError, match="save_minutes=-1.0 must not be negative"):
        train(small_config, tmp_path / "run")
