"""Whole runs: resumed, stopped, spoilt."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from metaembed_jax.checkpoints.runs import RunCheckpoints
from metaembed_jax.config import with_keys
from metaembed_jax.data import sources
from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.evaluate_checkpoint import evaluate_checkpoint
from metaembed_jax.evaluation.held_out import HeldOut
from metaembed_jax.evaluation.report import package_versions
from metaembed_jax.evaluation.tables import format_tables
from metaembed_jax.hosts.votes import Terminated
from metaembed_jax.late_interaction.budgets import budget_name
from metaembed_jax.mesh import make_mesh
from metaembed_jax.model import MetaEmbed
from metaembed_jax.results import TaskResults, from_json, read_results
from metaembed_jax.training import loop
from metaembed_jax.training.initialize import find_start, initial_state
from metaembed_jax.training.loop import train
from metaembed_jax.training.step import make_trainer, run_mesh
from tests.evaluation.parsed_page import Page


def parameters_of(config, workdir, step):
    checkpoints = RunCheckpoints(workdir)
    parameters = checkpoints.restore_parameters(step, make_trainer(config, run_mesh(config)).abstract.parameters)
    checkpoints.close()
    return jax.device_get(parameters)


def assert_identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The folder of an uninterrupted run; the first test that needs the run trains it."""
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture
def whole(whole_run, small_config):
    if not (whole_run / "results.json").exists():
        assert train(small_config, whole_run)
    return whole_run


def stop_at(monkeypatch, step, action):
    """Calls `action` when the batch of `step` is put on the devices."""
    calls = []

    def put(batch, mesh, original=loop.put_batch):
        calls.append(None)
        if len(calls) == step:
            action()
        return original(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", put)


def test_a_run_leaves_its_results(small_config, whole):
    results = read_results(whole / "results.json")
    forward = results.boards[0].tasks[0]
    assert [search.budget for search in forward.searches] == list(map(budget_name, small_config.objectives.budgets))
    assert forward.queries == len(sources.retrieval("icons", small_config.data.dir, "test").queries)
    assert (whole / "quality.png").stat().st_size > 10_000
    page = Page((whole / "report.html").read_text(encoding="utf-8"))
    (_, plot), *shown = page.images()
    assert plot.size == Image.open(whole / "quality.png").size and len(page.all("article")) == 10 == len(forward.failures)
    assert len(shown) == sum(len(failure.right) + len(failure.above) for failure in forward.failures)
    assert (
        results.data == f"icons, {forward.data}"
        and results.data in page.all("footer")[0][1]
        and "text→image" in page.all("caption")[0][1]
    )
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, 9))
    assert {
        "loss/1:1",
        "accuracy/16:64",
        "gradient_norm",
        "samples_per_second",
        "flops_per_second",
        "fill/tokens",
        "fill/patches",
        "cut",
        "shrunk",
    } <= next(line for line in lines if "loss" in line).keys()
    assert lines[0]["step"] == 0 and lines[0]["rows"] >= 16 and lines[0]["rows/tokens"] == 140


def test_interrupted_equals_uninterrupted(small_config, whole, tmp_path, monkeypatch):
    def fail():
        raise KeyboardInterrupt

    stop_at(monkeypatch, 6, fail)
    with pytest.raises(KeyboardInterrupt):
        train(small_config, tmp_path / "run")
    monkeypatch.undo()
    assert train(small_config, tmp_path / "run")
    assert_identical(parameters_of(small_config, whole, 8), parameters_of(small_config, tmp_path / "run", 8))
    ours = [line for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert [json.loads(line)["step"] for line in ours] == list(range(1, 9))


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_at_any_other_moment_loses_nothing(small_config, whole, tmp_path, monkeypatch, capsys):
    """SIGTERM while a run starts, validates, saves, and evaluates the test split; a second one while it saves."""

    def terminated_in(module, name, when=lambda *_: True):
        original = getattr(module, name)

        def call(*arguments, **keys):
            if when(*arguments):
                terminate()
            return original(*arguments, **keys)

        monkeypatch.setattr(module, name, call)

    terminated_in(loop, "initial_state")
    with pytest.raises(Terminated) as stopped:
        train(small_config, tmp_path / "run")
    assert stopped.value.code == 143 and "stopped by SIGTERM; start the same command again" in capsys.readouterr().err
    monkeypatch.undo()

    def ended_with_the_job(*_):
        terminate()
        raise UserError("one of the processes that make batches was ended from outside")
        yield

    monkeypatch.setattr(loop, "iterate", ended_with_the_job)
    with pytest.raises(Terminated):
        train(small_config, tmp_path / "run")
    monkeypatch.undo()

    small_config = with_keys(small_config, {"evaluation.validate_every": 3, "schedule.save_every": 100})
    terminated_in(HeldOut, "run", lambda evaluator, *_: evaluator.name == "validation")
    terminated_in(RunCheckpoints, "save")
    terminated_in(RunCheckpoints, "wait")
    assert train(small_config, tmp_path / "run") is False
    assert "stopped by SIGTERM after step 3" in capsys.readouterr().out
    monkeypatch.undo()
    checkpoints = RunCheckpoints(tmp_path / "run")
    assert checkpoints.steps() == [3] and checkpoints.best_step() == 3
    checkpoints.close()

    terminated_in(HeldOut, "run", lambda evaluator, *_: evaluator.name == "test")
    small_config = with_keys(small_config, {"evaluation.validate_every": 8})
    with pytest.raises(Terminated):
        train(small_config, tmp_path / "run")
    assert not (tmp_path / "run/results.json").exists()
    monkeypatch.undo()
    assert train(small_config, tmp_path / "run")
    out = capsys.readouterr().out
    assert "resuming at step 8 of 8" in out
    assert out.count("resuming with other settings: evaluation.validate_every from 3 to 8\n") == 1
    assert_identical(parameters_of(small_config, whole, 8), parameters_of(small_config, tmp_path / "run", 8))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_another_config_is_refused(small_config, whole):
    small_config = with_keys(small_config, {"objectives.matryoshka.temperature": 0.05})
    with pytest.raises(UserError, match=r"another config: objectives.matryoshka.temperature is 0.03 there and 0.05 here"):
        train(small_config, whole)


def test_corrupt_latest_checkpoint_falls_back(small_config, whole, tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(small_config, tmp_path / "run") is False
    monkeypatch.undo()
    for path in (tmp_path / "run/checkpoints/6").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert train(small_config, tmp_path / "run")
    stdout = capsys.readouterr().out
    assert "checkpoints/6 cannot be read" in stdout and "resuming at step 4 of 8" in stdout
    assert (tmp_path / "run/checkpoints/6.unreadable").is_dir()
    assert_identical(parameters_of(small_config, whole, 8), parameters_of(small_config, tmp_path / "run", 8))


@pytest.mark.parametrize("content", ["", '{"metr', "[]"])
def test_a_checkpoint_with_a_torn_metric_is_set_aside(small_config, whole, tmp_path, capsys, content):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "checkpoints/8/metrics/metrics").write_text(content)
    assert train(small_config, run)
    out = capsys.readouterr().out
    assert "checkpoints/8/metrics/metrics cannot be read" in out and "resuming at step 6" in out
    assert (run / "checkpoints/8.unreadable/parameters").is_dir()
    assert_identical(parameters_of(small_config, whole, 8), parameters_of(small_config, run, 8))


def test_a_start_of_another_architecture_is_refused(small_config, whole, tmp_path):
    small_config = with_keys(small_config, {"init_from": str(whole), "model.architecture.text_config.rope_theta": 5000.0})
    with pytest.raises(UserError, match="has text_config.rope_theta=10000.0, and config.model.architecture has 5000.0"):
        train(small_config, tmp_path / "run")


def test_the_config_that_a_run_starts_from_is_trained_first(small_config, tmp_path, monkeypatch, capsys):
    first = Path(__file__).with_name("small.py").resolve()
    monkeypatch.chdir(tmp_path)
    small_config = with_keys(small_config, {"init_from": f"{first}:first"})
    stop_at(monkeypatch, 8 + 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(small_config, tmp_path / "run") is False
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert "starting from step 8 of runs/small_first" in capsys.readouterr().out
    assert json.loads(Path("runs/small_first/results.json").read_text())["config"]["model"]["embedding_dim"] == 24

    # Stopped after its own first step, the second stage resumes without the first.
    shutil.rmtree("runs/small_first")
    assert train(small_config, tmp_path / "run")
    assert "trained first" not in capsys.readouterr().out and not Path("runs").joinpath("small_first").exists()


def test_a_head_of_another_width_is_fresh_and_windows_may_differ(small_config, whole, tmp_path):
    small_config = with_keys(
        small_config, {"init_from": str(whole), "model.embedding_dim": 6, "model.architecture.vision_config.window_size": 112}
    )
    trainer, checkpoints = make_trainer(small_config, make_mesh()), RunCheckpoints(tmp_path)
    state = initial_state(small_config, trainer, checkpoints, find_start(small_config)[1])
    checkpoints.close()
    fresh = jax.device_get(trainer.init().parameters["head"])
    small_config = with_keys(small_config, {"model.embedding_dim": 16})
    trained = parameters_of(small_config, whole, RunCheckpoints(whole).best_step())
    assert_identical(jax.device_get(state.parameters), trained | {"head": fresh})


def test_stages_without_a_first_one_are_refused(small_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = Path(__file__).with_name("small.py").resolve()
    Path("round.py").write_text(
        "from metaembed_jax.config import load_config, with_keys\n\n"
        "def get_config(arg=None):\n"
        f"    return with_keys(load_config({str(small)!r}), {{'name': 'round', 'init_from': 'round.py'}})\n"
    )
    small_config = with_keys(small_config, {"init_from": "round.py"})
    with pytest.raises(UserError, match="round.py starts from round.py: a first stage must start from something else"):
        train(small_config, tmp_path / "run")


def test_a_workdir_that_cannot_be_is_refused_before_the_first_stage(small_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_config = with_keys(small_config, {"init_from": f"{Path(__file__).with_name('small.py').resolve()}:first"})
    Path("notes").mkdir()
    Path("notes/mine.txt").write_text("mine")
    refused = {"runs/small_first": "is the folder of small_first", "notes": "is not a run", "notes/mine.txt": "is a file"}
    for workdir, message in refused.items():
        with pytest.raises(UserError, match=message):
            train(small_config, Path(workdir))
    small_config = with_keys(small_config, {"model.trained": (("nothing", "full"),)})
    with pytest.raises(UserError, match="'nothing' matches none"):
        train(small_config, tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes"]


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"config": null}', '{"config": {"name": "x"}}', "\xff", "{"])
def test_a_record_that_is_none_is_refused(small_config, whole, tmp_path, content):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "run.json").write_text(content, encoding="latin1")
    for use in (lambda: train(small_config, run), lambda: MetaEmbed.from_pretrained(run)):
        with pytest.raises(UserError, match="run.json"):
            use()


@pytest.mark.parametrize(
    "changes",
    [{"query_tokens": 20, "document_tokens": 60}, {"document_tokens": 60}, {"architecture.vision_config.window_size": 56}],
)
def test_evaluation_by_another_model_is_refused(small_config, whole, tmp_path, changes):
    changes = {f"model.{key}": value for key, value in changes.items()}
    small_config = with_keys(small_config, changes | {"objectives.matryoshka.groups": ((1, 1),)})
    with pytest.raises(UserError, match="is a run of another model: .* there and .* here"):
        evaluate_checkpoint(small_config, whole, tmp_path / "eval", None)


def test_meta_tokens_of_the_other_side_are_not_taken(small_config, whole, tmp_path):
    small_config = with_keys(
        small_config,
        {"init_from": str(whole), "model.query_tokens": 20, "model.document_tokens": 60, "objectives.matryoshka.groups": ((1, 1),)},
    )
    with pytest.raises(UserError, match="document_tokens is 64 there and 60 here"):
        train(small_config, tmp_path / "run")


def test_a_first_stage_of_another_config_is_refused(small_config, whole, tmp_path, monkeypatch):
    first = Path(__file__).with_name("small.py").resolve()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, tmp_path / "runs/small_first")
    small_config = with_keys(small_config, {"init_from": f"{first}:first"})
    with pytest.raises(UserError, match="runs/small_first is a run of another config: model.embedding_dim is 16 there and 24 here"):
        train(small_config, tmp_path / "run")


def test_a_benchmark_in_training_may_select_the_best_checkpoint(small_config, tmp_path, monkeypatch):
    pytest.importorskip("mteb")
    from metaembed_jax.evaluation.mteb import evaluator, tasks
    from tests.evaluation.mteb.pages import Pages

    monkeypatch.setattr(evaluator, "find", {"noise": [tasks.Benchmark("noise", [Pages()], [])]}.get)
    evaluation = {"evaluation.evaluations": (("noise", ""),), "evaluation.select": "mteb/noise"}
    config = with_keys(small_config, {**evaluation, "schedule.steps": 1, "optimizer.warmup_steps": 0})
    assert train(config, tmp_path / "run")
    (figures,) = (line for line in metrics_of(tmp_path / "run") if "validation/R@10/16:64" in line)
    stored = json.loads((tmp_path / "run/checkpoints/1/metrics/metrics").read_text())
    assert list(stored.values()) == [figures["mteb/noise/16:64"]] != [figures["validation/R@10/16:64"]]
    task = from_json(TaskResults, json.loads((tmp_path / "run/eval/mteb/NoisePages.json").read_text()))
    assert task.values()["16:64"].mean == figures["mteb/noise/16:64"]


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("select", "validation/R@3", "expected validation/R@1 or .* or validation/nDCG@10"),
        ("select", "mmeb/Precision@1", "config.evaluation.select='mmeb/Precision@1': expected validation/R@1 or"),
        ("evaluations", (("mmeb", ""),), "config.evaluation.evaluations: 'mmeb': expected the folder"),
        ("evaluations", (("mmeb", "nowhere"),), "config.evaluation.evaluations: 'mmeb': nowhere: expected {task}/test-"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_before_anything(small_config, tmp_path, key, value, message):
    with pytest.raises(UserError, match=message):
        train(with_keys(small_config, {f"evaluation.{key}": value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_stops(small_config, tmp_path):
    small_config = with_keys(small_config, {"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 1e30})
    with pytest.raises(UserError, match=r"step \d+: loss nan.*last good checkpoint is step \d+"):
        train(small_config, tmp_path / "run")


def test_a_checkpoint_of_another_shape_is_refused(small_config, whole):
    small_config = with_keys(small_config, {"model.embedding_dim": 8})
    abstract = make_trainer(small_config, make_mesh()).abstract.parameters
    checkpoints = RunCheckpoints(whole)
    with pytest.raises(UserError, match=r"another model: head.kernel has \(32, 16\) there, and the config asks for \(32, 8\)"):
        checkpoints.restore_parameters(8, abstract)
    checkpoints.close()


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("objectives.matryoshka.groups", ((1, 4), (2, 2)), "not nested"),
        ("objectives.matryoshka.groups", ((1, 1), (16, 128)), "beyond the vectors"),
        ("rows.microbatch_rows", 5, "expected at least data x fsdp = 8"),
        ("schedule.steps", 2, "config.optimizer.warmup_steps=2: expected fewer than config.schedule.steps=2"),
        ("schedule.exports", ("peft",), "peft stores adapters"),
    ],
)
def test_a_config_that_cannot_run_is_refused(small_config, tmp_path, key, value, message):
    with pytest.raises(UserError, match=message):
        train(with_keys(small_config, {key: value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_mesh_that_does_not_fit_is_refused(small_config, tmp_path):
    small_config = with_keys(small_config, {"mesh.data": 3})
    with pytest.raises(UserError, match="does not fit 8 devices"):
        train(small_config, tmp_path / "run")
    small_config = with_keys(small_config, {"mesh.data": 8, "rows.batch_size": 12})
    with pytest.raises(UserError, match="expected a multiple of data x fsdp = 8"):
        train(small_config, tmp_path / "run")


def test_a_full_disk_keeps_the_checkpoint_before(small_config, whole, tmp_path, monkeypatch):
    """No file may grow over 50 kB any more: to the one who writes it is a full disk, and no other process notices."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(self, step, *arguments, original=RunCheckpoints.save):
        if step == 6:
            self.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        return original(self, step, *arguments)

    monkeypatch.setattr(RunCheckpoints, "save", save)
    try:
        with pytest.raises(UserError, match=r"saving failed \(File too large.*\); checkpoints kept: 4, 2$"):
            train(small_config, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    monkeypatch.undo()
    assert train(small_config, tmp_path / "run")
    assert_identical(parameters_of(small_config, whole, 8), parameters_of(small_config, tmp_path / "run", 8))


def test_eval_on_a_task_of_mteb(small_config, whole, tmp_path, monkeypatch, capsys):
    pytest.importorskip("mteb")
    from metaembed_jax.evaluation.mteb import evaluator, tasks
    from tests.evaluation.mteb.pages import Pages

    monkeypatch.setattr(evaluator, "find", {"noise": [tasks.Benchmark("noise", [Pages()], [])]}.get)
    evaluate_checkpoint(small_config, whole, tmp_path, "1:1,1:1:4>16:64", "noise")
    results = read_results(tmp_path / "mteb.json")
    means = results.boards[0].mean()
    assert list(means) == ["1:1", "1:1:4>16:64"]
    stdout = capsys.readouterr().out
    assert f"{whole}: noise, best checkpoint (step 8)\nnoise, main score (%) of 14 queries in 1 tasks\n" in stdout
    assert f"{100 * means['1:1'].mean:.1f}" in stdout
    page = (tmp_path / "mteb.html").read_text(encoding="utf-8")
    assert "<h1>small: noise</h1>" in page and "step 8" in page and f"jax {package_versions()['jax']}" in page


@pytest.mark.parametrize("devices", [1, 8])
def test_eval_reproduces_the_table(whole, data_dir, tmp_path, devices):
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", f"count={devices}")}
    flags = ["--config=tests/training/small.py", f"--config.data.dir={data_dir}", f"--checkpoint={whole}", f"--out={tmp_path}"]
    root = Path(__file__).parents[2]
    process = subprocess.run([sys.executable, "eval.py", *flags], cwd=root, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    trained, evaluated = (read_results(folder / "results.json") for folder in (whole, tmp_path))
    assert [task.searches for task in evaluated.tasks()] == [task.searches for task in trained.tasks()]
    assert format_tables(trained) in process.stdout
