"""The published mixture, from files in the field's formats to a run that is interrupted."""

import json
import shutil

import numpy as np
import pytest

from metaembed_jax.config import load_config, with_keys
from metaembed_jax.data import sources
from metaembed_jax.results import read_results
from metaembed_jax.training.loop import train
from tests.checkpoints.huggingface_files import random_tensors, write
from tests.data.field_files import write_colpali, write_mmeb, write_pairs
from tests.training.batches import make_dataset, make_plan

IMAGE_TO_IMAGE = ("MSCOCO", "CIRR", "NIGHTS", "InfoSeek_it2it")
TEXT_TO_IMAGE = ("MSCOCO_t2i", "VisualNews_t2i", "VisDial", "WebQA", "TAT-DQA")


@pytest.fixture(scope="module")
def mixed_config(tmp_path_factory):
    """configs/7b.py with its whole mixture, on a small model and 24 rows of each source."""
    folder = tmp_path_factory.mktemp("mixture")
    config = load_config("configs/7b.py", {"data.dir": str(folder / "data")})
    config = with_keys(config, {"init_from": str(write(folder / "model", random_tensors())), "model.architecture": {}})
    names = [name for name, *_ in config.data.sources]
    for name in names[2:]:
        kind = "it2it" if name in IMAGE_TO_IMAGE else "t2i" if name in TEXT_TO_IMAGE else "vqa"
        write_mmeb(folder / "MMEB-train", name, 24, kind)
    write_colpali(folder / "colpali", 24)
    write_pairs(folder / "visrag.jsonl", [{"query": f"visrag {n}", "positive_image": f"colpali/{n}.png"} for n in range(24)])
    for number in range(24):
        (folder / f"colpali/{number}.png").write_bytes((folder / f"MMEB-train/images/CIRR/Train/{number}.jpg").read_bytes())
    for kind, files in (("mmeb", "MMEB-train"), ("colpali", "colpali"), ("pairs", "visrag.jsonl")):
        sources.prepare_from(kind, folder / files, folder / "data", workers=0, skips=0)

    return with_keys(
        config,
        {
            "data.sub_batch": 2,
            "data.workers": 0,
            "rows.batch_size": 24,
            "rows.microbatch_rows": 8,
            "rows.size": (256, 128),
            "model.dtype": "float32",
            "mesh.fsdp": 1,
            "model.lora.rank": 4,
            "schedule.steps": 4,
            "optimizer.warmup_steps": 1,
            "schedule.log_every": 1,
            "evaluation.validate_every": 4,
            "schedule.save_every": 2,
        },
    )


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_the_published_mixture_trains_and_goes_on_where_it_was_killed(mixed_config, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(mixed_config, whole)
    shutil.copytree(whole, run)  # as a kill after step 3 would have left it
    shutil.rmtree(run / "checkpoints/4")
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] < 4))
    assert train(mixed_config, run)
    assert losses(run) == losses(whole) and list(losses(run)) == [1, 2, 3, 4]
    assert np.isfinite(list(losses(run).values())).all()

    results, names = read_results(whole / "results.json"), [name for name, *_ in mixed_config.data.sources]
    forward = results.boards[0]
    assert forward.name == "query→document" and forward.total == len(names)
    assert {task.name for task in forward.tasks} | set(", ".join(forward.notes).split(": ")[-1].split(", ")) >= set(names)
    figures = next(line for line in map(json.loads, lines) if "validation/R@10/16:64" in line)
    of_sources = [value for name, value in figures.items() if name.endswith("/R@10/16:64") and name.count("/") == 3]
    assert len(of_sources) > 10 and figures["validation/R@10/16:64"] == pytest.approx(np.mean(of_sources))


def test_its_sub_batches_are_of_one_source_and_negatives_are_where_rows_have_them(mixed_config):
    items, plan = make_plan(mixed_config)
    dataset = make_dataset(mixed_config, (items, plan))
    names = [name for name, *_ in mixed_config.data.sources]
    with_negatives = {number for number, name in enumerate(names[2:], 2) if name not in IMAGE_TO_IMAGE + TEXT_TO_IMAGE}
    for step in range(4):
        batch = dataset[step]
        drawn = batch.source.reshape(12, 2)
        assert (drawn[:, 0] == drawn[:, 1]).all() and len(np.unique(drawn)) > 6
        assert batch.negative_mask[:, 0].tolist() == [number in with_negatives for number in batch.source.tolist()]
        assert batch.rows.tokens.shape == (-(-plan.rows // 8), 8, 256)
