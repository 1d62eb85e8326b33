"""The schedule of checkpoints, by a clock that the test sets."""

import json

import pytest

from metaembed_jax.checkpoints.runs import RunCheckpoints
from metaembed_jax.config import with_keys
from metaembed_jax.training import loop
from metaembed_jax.training.loop import train
from metaembed_jax.training.saving import SaveSchedule


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


def test_a_save_is_due_by_steps_and_by_the_clock():
    clock = Clock()
    saves = SaveSchedule(4, 1.5, clock)
    assert [step for step in range(1, 10) if saves.due(step)] == [4, 8]
    clock.seconds += 89
    assert not saves.due(9)
    clock.seconds += 1
    assert saves.due(9) and saves.due(10)  # until a save begins
    saves.begin()
    assert not saves.due(11)
    clock.seconds += 60
    saves.begin()  # one that was not due
    clock.seconds += 60
    assert not saves.due(13)


def test_without_minutes_saves_follow_the_steps_only():
    clock = Clock()
    saves = SaveSchedule(4, 0.0, clock)
    clock.seconds += 1e9
    assert not saves.due(3) and saves.due(4)


def test_a_run_saves_by_the_clock(small_config, tmp_path, monkeypatch):
    """Each step takes four minutes of the clock; the data ends before the run does, so that nothing is evaluated."""
    clock, batches = Clock(), iter(range(7))

    def put(batch, mesh, original=loop.put_batch):
        clock.seconds += 240
        next(batches)
        return original(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", put)
    monkeypatch.setattr(loop, "SaveSchedule", lambda steps, minutes: SaveSchedule(steps, minutes, clock))
    small_config = with_keys(
        small_config, {"schedule.save_every": 100, "schedule.keep_checkpoints": 9, "schedule.save_minutes": 11.5}
    )
    with pytest.raises(StopIteration):
        train(small_config, tmp_path / "run")
    checkpoints = RunCheckpoints(tmp_path / "run", keep=9)
    assert checkpoints.steps() == [6, 3]
    checkpoints.close()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    plan, *lines = lines
    assert plan["rows"] > 0
    assert lines[0]["seconds/compile"] > 0 == lines[1]["seconds/compile"]
    assert lines[-1]["flops_per_second"] > 0 and lines[-1]["seconds_left"] > 0 and "mfu" not in lines[-1]
