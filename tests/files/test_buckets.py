"""A run in a bucket: trained, killed, resumed, evaluated, exported, with the numbers of a run on a disk."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from metaembed_jax import cli, files
from metaembed_jax.checkpoints.frozen import BASE, is_kept
from metaembed_jax.checkpoints.runs import RunCheckpoints
from metaembed_jax.checkpoints.workdir import COMMITTED
from metaembed_jax.config import load_config, with_keys
from metaembed_jax.evaluation.evaluate_checkpoint import evaluate_checkpoint
from metaembed_jax.mesh import make_mesh
from metaembed_jax.results import read_results
from metaembed_jax.training.initialize import find_start
from metaembed_jax.training.step import make_trainer
from tests.files.emulator import BUCKET

ROOT = Path(__file__).parents[2]
STEPS = 8


def start(config, workdir, variables, *flags):
    command = [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir}", *flags]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process, code=0):
    output = process.communicate()[0].decode()
    assert process.returncode == code, output[-2000:]
    return output


def parameters_of(run, config):
    checkpoints = RunCheckpoints(run)
    abstract = make_trainer(config, make_mesh(devices=jax.devices()[:1])).abstract.parameters
    try:
        assert checkpoints.steps()[0] == STEPS
        return jax.device_get(checkpoints.restore_parameters(STEPS, abstract))
    finally:
        checkpoints.close()


def wait_for(happened, process, seconds=120):
    until = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0].decode()[-2000:]
        time.sleep(0.05)


@pytest.fixture(scope="module")
def runs(bucket, data_dir, tmp_path_factory):
    """(config, run on a disk, the same run in the bucket, killed twice)."""
    folder = tmp_path_factory.mktemp("runs")
    flag = f"tests/files/adapted.py:{folder / 'base'}"
    config = load_config(flag, {"data.dir": str(data_dir)})
    flags = [f"--config.data.dir={data_dir}"]
    finish(start(flag, folder / "local", bucket, *flags))

    files.upload(folder / "base", files.any_path(f"{BUCKET}/model"))
    run = files.any_path(f"{BUCKET}/run")
    config = with_keys(config, {"init_from": f"{BUCKET}/model"})
    flags.append(f"--config.init_from={config.init_from}")
    bucket = bucket | {"XDG_CACHE_HOME": str(folder / "cache")}
    random = np.random.default_rng()

    process = start(flag, run, bucket, *flags)
    wait_for(lambda: (run / "run.json").exists(), process)
    time.sleep(random.uniform(0, 4))  # while the base is kept, compiled for, or in the first steps
    process.kill()
    process.communicate()

    process = start(flag, run, bucket, *flags)
    wait_for(lambda: any((run / "checkpoints").glob(f"*/{COMMITTED}")), process)
    time.sleep(random.uniform(0, 0.5))
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0].decode()
    assert process.returncode in (0, 143), output[-2000:]
    assert is_kept(run)

    files.remove_folder(files.any_path(f"{BUCKET}/model"))  # a preempted host reads its shards, and neither hub nor first base
    finish(start(flag, run, bucket, *flags))
    return config, folder / "local", run


def test_the_numbers_are_those_of_a_run_on_a_disk(runs):
    config, local, run = runs
    config, start = find_start(config, run)
    assert start.base.directory == run / BASE
    jax.tree.map(np.testing.assert_array_equal, parameters_of(local, config), parameters_of(run, config))
    assert read_results(local / "results.json").boards == read_results(run / "results.json").boards
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert not (run / "lock").exists()


def test_it_is_evaluated_exported_and_drawn(runs, bucket, tmp_path, monkeypatch):
    config, local, run = runs
    monkeypatch.chdir(tmp_path)
    evaluate_checkpoint(config, run, run / "eval", "1:1")
    assert [search.budget for search in read_results(run / "eval" / "results.json").boards[0].tasks[0].searches] == ["1:1"]
    assert (run / "eval" / "report.html").exists()
    cli.main(["export", f"--checkpoint={run}", f"--out={run}/peft", "--format=peft"])
    cli.main(["export", f"--checkpoint={local}", "--out=peft", "--format=peft"])
    for name in ("adapter_model.safetensors", "metaembed.safetensors", "adapter_config.json"):
        ours, theirs = (run / "peft" / name).read_bytes(), (tmp_path / "peft" / name).read_bytes()
        assert name.endswith(".json") or ours == theirs
    assert (run / "peft" / "README.md").exists()
    cli.main(["plot", f"{run}/results.json", f"{local}/results.json", f"--out={run}/both.png"])
    assert (run / "both.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]
