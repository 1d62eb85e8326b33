"""Runs on sources too small for a split, a batch or a disk: what they lack is said, or refused, before the first step."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from metaembed_jax.config import load_config, with_keys
from metaembed_jax.data import sources
from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.evaluate_checkpoint import evaluate_checkpoint
from metaembed_jax.results import read_results
from metaembed_jax.training.loop import train
from tests.checkpoints.huggingface_files import random_tensors, write
from tests.data.field_files import write_pairs

SIZES = {"nine": 9, "twenty": 20, "forty": 40}


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory):
    """Two steps of four pairs of texts."""
    folder = tmp_path_factory.mktemp("sources")
    for name, rows in SIZES.items():
        write_pairs(folder / f"{name}.jsonl", [{"query": f"a {n}", "positive": f"b {n} of {name}"} for n in range(rows)])
        sources.prepare_from("pairs", folder / f"{name}.jsonl", folder / "data", 0, 0)
    config = load_config("tests/training/small.py", {"data.dir": str(folder / "data")})
    config = with_keys(config, {"init_from": str(write(folder / "model", random_tensors())), "model.architecture": {}})
    changes = {"data.sources": (("nine", 1.0, 0),), "rows.batch_size": 8, "rows.size": (256, 0)}
    short = {"schedule.steps": 2, "optimizer.warmup_steps": 1, "evaluation.validate_every": 1}
    return with_keys(config, {**changes, **short, "schedule.exports": ("transformers",)})


def test_without_rows_to_validate_and_test_a_run_goes_without(tiny_config, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(tiny_config, run)
    out = capsys.readouterr().out
    before = out[: out.index("rows: ")]
    line = "validation: nine has no validation rows (a twentieth of a source is held out); the last checkpoint is the best\n"
    assert line in before
    assert "test: nine has no test rows; the run writes no results\n" in before
    assert "config.data.augment=True has no effect: only the source 'icons' reads it\n" in before
    assert (run / "checkpoints/2").is_dir() and not (run / "results.json").exists()
    assert (run / "export/transformers/README.md").is_file()
    with pytest.raises(UserError, match="nine: no source has test pairs; add pairs"):
        evaluate_checkpoint(tiny_config, run, tmp_path / "eval", None)

    # The same run on a source that was prepared again, of a row that changed; a record that was edited.
    data = tmp_path / "data"
    shutil.copytree(tiny_config.data.dir, data)
    rows = Path(tiny_config.data.dir).parent / "nine.jsonl"
    write_pairs(tmp_path / "nine.jsonl", [*map(json.loads, rows.read_text().splitlines()[:-1]), {"query": "a", "positive": "new"}])
    shutil.rmtree(data / "nine")
    (fingerprint,) = (
        marker["fingerprint"] for marker in sources.prepare_from("pairs", tmp_path / "nine.jsonl", data, 0, 0).values()
    )
    assert train(with_keys(tiny_config, {"data.dir": str(data)}), run)
    out = capsys.readouterr().out
    assert (
        "resuming at step 2 of 2" in out
        and f", the rows of nine from '{before_fingerprint(tiny_config)}' to '{fingerprint}'\n" in out
    )
    record = json.loads((run / "run.json").read_text())
    assert record["data"] == {"nine": fingerprint} and "the rows of nine" in record["changes"][0]["keys"]
    (run / "run.json").write_text(json.dumps(record | {"changes": "none"}))
    with pytest.raises(UserError, match="run.json: changes='none': expected a list"):
        train(tiny_config, run)


def test_a_single_held_out_row_cannot_choose_a_checkpoint(tiny_config, tmp_path, capsys):
    config = with_keys(tiny_config, {"data.sources": (("twenty", 1.0, 0), ("nine", 1.0, 0)), "schedule.exports": ()})
    config = with_keys(config, {"data.sub_batch": 4})
    assert train(config, tmp_path / "run")
    out = capsys.readouterr().out
    for line in (
        "validation: config.evaluation.select='validation/R@10' is the same for every model; the last checkpoint is the best",
        "validation: without rows in this split, and left out: nine",
        "test: twenty has 1 queries and 1 documents; R@1, R@5, R@10, nDCG@10 is 100 % for any model",
    ):
        assert f"{line}\n" in out[: out.index("rows: ")]
    results = read_results(tmp_path / "run/results.json")
    assert results.step == 2 and results.boards[0].tasks[0].values("R@1")["1:1"].mean == 1


def before_fingerprint(config):
    return sources.prepare("nine", config.data.dir)["fingerprint"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rows.batch_size": 16}, "source 'nine' has 9 training pairs; expected at least config.rows.batch_size=16"),
        ({"data.sub_batch": 8, "rows.batch_size": 16}, "takes up to 16 pairs of it, by its weight; expected at most the 9"),
        ({"data.sources": (("nine", 1.0, 4),)}, "source 'nine' uses 4 training pairs; expected at least"),
        ({"data.sources": (("nine", 1.0, 0), ("ten", 1.0, 0))}, "holds no complete preparation of a source 'ten'"),
        ({"data.negatives": 1}, "no pair of nine has negatives"),
        ({"schedule.exports": ("sentence-transformers", "peft")}, "peft stores adapters"),
    ],
)
def test_what_a_source_cannot_give_is_refused_without_a_folder(tiny_config, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(with_keys(tiny_config, changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_source_twice_is_refused(tiny_config):
    with pytest.raises(UserError, match="config.data.sources has 'forty' twice, so a step could have a pair twice"):
        with_keys(tiny_config, {"data.sources": (("forty", 1.0, 0), ("nine", 1.0, 0), ("forty", 2.0, 9))})


def test_a_later_stage_without_its_source_is_refused_before_the_first(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first.py").write_text(
        "from metaembed_jax.config import with_keys\nfrom metaembed_jax.config.record import from_record\n\n"
        f"def get_config(arg=None):\n    return from_record({json.loads(json.dumps(record_of(tiny_config)))!r})\n"
    )
    config = with_keys(tiny_config, {"init_from": "first.py", "name": "second", "data.sources": (("ten", 1.0, 0),)})
    with pytest.raises(UserError, match="holds no complete preparation of a source 'ten'"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "runs").exists()


def record_of(config):
    from metaembed_jax.config.record import to_record

    return to_record(with_keys(config, {"name": "first"}))


def test_a_disk_without_room_and_a_folder_that_cannot_be_are_refused(tiny_config, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file; expected a folder, or choose another path than .*file/run"):
        train(tiny_config, tmp_path / "file/run")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, free=10**5))
    message = "run: up to 2 checkpoints are on the disk at once, .* GB each, and its disk has 0.0001 GB free: free space"
    with pytest.raises(UserError, match=message):
        train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
