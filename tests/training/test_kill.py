"""A run that is killed at any moment and started again ends as if nothing had happened."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from metaembed_jax.checkpoints.runs import RunCheckpoints
from metaembed_jax.config import with_keys
from metaembed_jax.mesh import make_mesh
from metaembed_jax.training.step import make_trainer

ROOT = Path(__file__).parents[2]
STEPS, KILLS = 40, 10


@pytest.mark.slow
def test_killed_at_ten_random_moments(small_config, data_dir, tmp_path):
    flags = [f"--config.data.dir={data_dir}", f"--config.schedule.steps={STEPS}", f"--config.evaluation.validate_every={STEPS}"]

    def start(workdir: Path) -> subprocess.Popen:
        command = [sys.executable, "train.py", "--config=tests/training/small.py", f"--workdir={workdir}", *flags]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def finish(process: subprocess.Popen) -> None:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()[-2000:]

    finish(start(tmp_path / "warm"))  # fills the cache of compiled programs
    began = time.monotonic()
    finish(start(tmp_path / "whole"))
    duration = time.monotonic() - began

    killed = tmp_path / "killed"
    for moment in np.random.default_rng(0).uniform(0, duration, KILLS):
        process = start(killed)
        try:
            process.wait(timeout=moment)
            finish(process)
            shutil.rmtree(killed)  # it ended, so the next one starts again
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    finish(start(killed))

    small_config = with_keys(small_config, {"schedule.steps": STEPS, "evaluation.validate_every": STEPS})
    abstract = make_trainer(small_config, make_mesh(devices=jax.devices()[:1])).abstract.parameters
    whole, again = (last_parameters(tmp_path / name, abstract) for name in ("whole", "killed"))
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    lines = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))


def last_parameters(run: Path, abstract: dict) -> dict:
    checkpoints = RunCheckpoints(run)
    try:
        assert checkpoints.steps()[0] == STEPS
        return jax.device_get(checkpoints.restore_parameters(STEPS, abstract))
    finally:
        checkpoints.close()
