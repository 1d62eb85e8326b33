"""Several processes on one machine are several hosts: real collectives, and one run."""

import dataclasses
import json
import signal
import time

import numpy as np
import pytest

from metaembed_jax.config import load_config
from metaembed_jax.files import any_path
from tests.files.emulator import BUCKET
from tests.several_hosts import Hosts
from tests.training.batches import make_dataset

SMALL = "tests/training/small.py"


def training(workdir, data_dir, **keys):
    return ["train.py", f"--config={SMALL}", f"--workdir={workdir}", f"--config.data.dir={data_dir}"] + [
        f"--config.{key}={value}" for key, value in keys.items()
    ]


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def wait_for(path, pattern="."):
    until = time.monotonic() + 300
    while not (path.exists() and (pattern == "." or any(path.glob(pattern)))):
        assert time.monotonic() < until, f"{path} does not come"
        time.sleep(0.05)


LONG = {"schedule.steps": 30, "schedule.save_every": 5, "evaluation.validate_every": 30}


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """A run on one host."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with Hosts(1, training(workdir, data_dir, **LONG)) as hosts:
        hosts.wait()
    return workdir


@pytest.mark.parametrize("before, after, place", [(2, 1, "disk"), pytest.param(1, 2, "bucket", marks=pytest.mark.slow)])
def test_killed_and_resumed_on_another_number_of_hosts(whole, data_dir, tmp_path, bucket, before, after, place):
    run = tmp_path / "run" if place == "disk" else any_path(f"{BUCKET}/{tmp_path.name}")
    command = training(run, data_dir, **LONG)
    with Hosts(before, command) as hosts:
        wait_for(run / "checkpoints" / "10")
    with Hosts(after, command) as hosts:
        outputs = hosts.wait()
    assert "resuming at step" in outputs[0][0] and not any(out for out, _ in outputs[1:])  # the first host speaks for all
    figures, expected = losses(run), losses(whole)
    assert list(figures) == list(range(1, 31)) and (run / "results.json").exists()
    np.testing.assert_allclose(list(figures.values()), list(expected.values()), rtol=1e-4)


def test_two_hosts_evaluate_as_one(whole, data_dir, tmp_path):
    """Each host encodes and scores its share of the documents; the first one writes the files of a single host."""
    command = ["eval.py", f"--config={SMALL}", f"--checkpoint={whole}", f"--config.data.dir={data_dir}"]
    for count in (1, 2):
        with Hosts(count, [*command, f"--out={tmp_path / str(count)}"]) as hosts:
            outputs = hosts.wait()
        assert outputs[0][0] and not any(out for out, _ in outputs[1:])
    for name in ("results.json", "report.html"):
        assert (tmp_path / "2" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


def test_sigterm_to_one_host_saves_and_stops_all(data_dir, tmp_path):
    """After a save by the first host's clock; both exit with the code that schedulers start a job again for."""
    often = {"schedule.save_every": 300, "schedule.save_minutes": 0.02}
    by_clock = training(tmp_path / "run", data_dir, **LONG | {"schedule.steps": 300} | often)
    command = training(tmp_path / "run", data_dir, **LONG | {"schedule.steps": 300})
    with Hosts(2, by_clock) as hosts:
        wait_for(tmp_path / "run/checkpoints", "[0-9]*")
        hosts.processes[1].send_signal(signal.SIGTERM)
        (out, _), _ = hosts.wait(code=143)
    step = int(out.split("stopped by SIGTERM after step ")[1].split(",")[0])
    assert step < 300 and step in losses(tmp_path / "run")
    after = -(-(step + 1) // 5) * 5
    with Hosts(2, command) as hosts:
        wait_for(tmp_path / f"run/checkpoints/{after}")
        assert f"resuming at step {step} of 300" in hosts.kill()[0]
    assert list(losses(tmp_path / "run"))[:after] == list(range(1, after + 1))


def test_sigterm_to_one_host_that_starts_stops_all(data_dir, tmp_path):
    with Hosts(2, training(tmp_path / "run", data_dir)) as hosts:
        wait_for(tmp_path / "run/tokenizer.json")
        hosts.processes[1].send_signal(signal.SIGTERM)
        outputs = hosts.wait(code=143)
    assert any("stopped by SIGTERM" in text for host in outputs for text in host)
    assert not any("Traceback" in errors or "error:" in errors for _, errors in outputs)


def test_hosts_that_disagree_are_refused(data_dir, tmp_path):
    with Hosts(2, training(tmp_path / "run", data_dir), lambda host: [f"--config.seed={host}"]) as hosts:
        outputs = hosts.wait(code=2)
    for _, errors in outputs:
        assert "the hosts of this run disagree: seed is 0 there and 1 here" in errors and "Traceback" not in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_any_layout_gives_the_same_losses_and_batches(data_dir, tmp_path):
    """Ten steps of `tiny` on 2 x 4, 4 x 2 and 1 x 8 devices."""
    figures = {}
    for count in (1, 2, 4):
        out = tmp_path / str(count)
        out.mkdir()
        with Hosts(count, ["-m", "tests.training.hosts_program", f"--data={data_dir}", f"--out={out}"]) as hosts:
            hosts.wait()
        parts = [np.load(out / f"{host}.npz") for host in range(count)]
        figures[count] = parts[0]["losses"]
        assert all(np.array_equal(part["losses"], figures[count]) for part in parts)
        assert_whole_batches(data_dir, parts)
    assert len(set(figures[1].tolist())) == 10
    for count in (2, 4):
        np.testing.assert_allclose(figures[count], figures[1], rtol=1e-4)


def assert_whole_batches(data_dir, parts):
    config = load_config("configs/tiny.py", {"data.dir": str(data_dir), "init_from": "", "schedule.steps": "61"})
    dataset = make_dataset(config)
    order = np.argsort(np.concatenate([part["rows"] for part in parts]))
    for step in range(10):
        batch = dataset[step]
        for name, rows in dataclasses.asdict(batch.rows).items():
            if name != "patch_arrays":
                whole = np.concatenate([part[f"{step}/{name}"] for part in parts], axis=1)
                np.testing.assert_array_equal(whole[:, order], rows)
        for name in ("queries", "documents"):
            assert all(np.array_equal(part[f"{step}/{name}"], getattr(batch, name)) for part in parts)
