"""Teacher scores and labels of candidates: from rows to batches, and errors of bad values."""

import json
import math

import jax
import numpy as np
import pytest

from metaembed_jax.backbones.qwen2_5_vl import FAMILY as QWEN2_5_VL
from metaembed_jax.batch.training import put
from metaembed_jax.config import load_config, with_keys
from metaembed_jax.data import sources, tokenizer
from metaembed_jax.data.pipeline import training_batches
from metaembed_jax.data.row_plan import plan_rows
from metaembed_jax.data.run_items import run_items
from metaembed_jax.data.sources import preparation, records, splits
from metaembed_jax.data.sources.candidates import as_arrays
from metaembed_jax.errors import UserError
from metaembed_jax.mesh import make_mesh
from metaembed_jax.network_config import model_config, row_limits
from tests.data.field_files import tevatron_corpus, tevatron_queries, write_pairs, write_tevatron

SCORES, LABELS = [9.5, None, -2.0], [1, 0.5, 0]


def row(number, **columns):
    return {"query": f"q{number}", "positive": f"p{number}", "negatives": [f"m{number}", f"n{number}"], **columns}


def prepare(directory, name, rows):
    write_pairs(directory / f"{name}.jsonl", rows)
    return sources.prepare_from("pairs", directory / f"{name}.jsonl", directory / "out", 0, 0)[name]


def read(directory, name, split="train"):
    return records.open_split(directory / "out" / name, preparation.VERSION, split).with_descriptions()


def test_numbers_of_rows_are_those_of_records_and_their_descriptions(tmp_path):
    rows = [row(0, teacher_scores=SCORES, labels=LABELS), row(1), row(2, teacher_scores=[None] * 3, labels=[2, 0, 0]), row(3)]
    marker = prepare(tmp_path, "mine", rows)
    first, *others = (source := read(tmp_path, "mine"))
    assert first["labels"] == LABELS and first["teacher_scores"][::2] == SCORES[::2] and math.isnan(first["teacher_scores"][1])
    assert not any({"labels", "teacher_scores"} & set(record) for record in others)  # nulls, and the usual labels
    assert marker["teacher_scores"] == marker["labels"] == 1 and source.describe(0)["labels"] == LABELS
    assert prepare(tmp_path / "other", "mine", [row(number) for number in range(4)])["fingerprint"] != marker["fingerprint"]


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"teacher_scores": [1, 2]}, "teacher_scores: 2 numbers; expected 3, one for the positive and for each negative"),
        ({"teacher_scores": "1, 2, 3"}, "teacher_scores: expected a list of numbers, not str"),
        ({"teacher_scores": [1, "2", 3]}, "teacher_scores: '2' is not a finite number"),
        ({"teacher_scores": [1, float("nan"), 3]}, "teacher_scores: nan is not a finite number"),
        ({"teacher_scores": [1, True, 3]}, "teacher_scores: True is not a finite number"),
        ({"teacher_scores": [1, 1e40, 3]}, "teacher_scores: 1e+40 is not a finite number"),
        ({"labels": [1, None, 0]}, "labels: None is not a finite number"),
        ({"labels": [1, -0.5, 0]}, "labels: -0.5 is negative; expected 0 for a negative, or the weight"),
        ({"labels": [0, 1, 0]}, "labels: the first is 0, which is that of the positive; expected its weight"),
    ],
)
def test_bad_numbers_are_named_by_file_and_row(tmp_path, columns, message):
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, "mine", [row(0), row(1), row(2, **columns)])
    assert str(caught.value).startswith(f"{tmp_path / 'mine.jsonl'}, row 2: {message}")


def test_passages_of_tevatron_have_scores_and_labels(tmp_path):
    queries = tevatron_queries(4, passages=True)
    queries[0]["positive_passages"] = [{"docid": "0", "score": 7.5}, {"docid": "3"}, {"docid": "2", "label": 0.25}]
    queries[0]["negative_passages"] = [{"docid": "3"}, {"docid": "1", "score": -1}, {"docid": "2", "score": 5}]
    write_tevatron(tmp_path / "pages", queries, tevatron_corpus(4))
    marker = sources.prepare_from("tevatron", tmp_path / "pages", tmp_path / "out", 0, 0)["pages"]
    first, second, *_ = records.open_split(tmp_path / "out" / "pages", preparation.VERSION, "train")
    assert first["labels"] == [1.0, 0.25, 0.0] and first["teacher_scores"][::2] == [7.5, -1.0] and marker["labels"] == 1
    assert first["negatives"][1] == second["positive"] and "labels" not in second
    queries[1]["negative_passages"] = [{"docid": "2", "score": float("inf")}]
    write_tevatron(tmp_path / "pages", queries, tevatron_corpus(4))
    with pytest.raises(UserError, match=r"row 1: score: inf is not a finite number"):
        sources.prepare_from("tevatron", tmp_path / "pages", tmp_path / "other", 0, 0)


def test_further_positives_are_right_answers_and_keep_rows_in_one_split(tmp_path):
    contents = [[b"q0", b"p0", b"p1"], [b"q1", b"p1"], [b"q2", b"q0"], None]
    assert len(set(splits.components_of(contents).tolist())) == 3
    pairs = [{"query": {"text": "a"}, "positive": {"text": "p"}, "negatives": [{"text": "r"}, {"text": "n"}], "labels": LABELS}]
    task = records.pairs_retrieval([*pairs, {"query": {"text": "b"}, "positive": {"text": "r"}, "negatives": []}])
    assert [item["text"] for item in task.documents] == ["p", "r"] and task.relevance == [{0, 1}, {1}]
    marker = prepare(tmp_path, "mine", [row(n, labels=[1, 1, 0]) for n in range(40)])
    assert marker["held_out"]["test"] == {"queries": 2, "documents": 4}


def test_fewer_negatives_than_a_record_has_keep_their_numbers():
    arrays = as_arrays([{"teacher_scores": [1.0, 2.0, 3.0], "labels": LABELS}, {}], 1)
    np.testing.assert_array_equal(arrays["teacher_scores"], np.array([[1, 2], [np.nan, np.nan]], np.float32))
    np.testing.assert_array_equal(arrays["labels"], np.array([[1, 0.5], [1, 0]], np.float32))


def batches(tmp_path, names, negatives, teacher_weight=0.0):
    """The batches of a run, and its mixture."""
    words = [row(number)[key] for number in range(8) for key in ("query", "positive")]
    learned = tokenizer.train(words, tmp_path / "tokenizer.json", QWEN2_5_VL, vocabulary=300)
    settings = with_keys(
        load_config("configs/7b.py"),
        {
            "rows.batch_size": 4,
            "rows.size": (288, 0),
            "schedule.steps": 4,
            "optimizer.warmup_steps": 0,
            "data.dir": str(tmp_path / "out"),
            "data.sources": tuple((name, 1.0, 0) for name in names),
            "data.negatives": negatives,
            "data.sub_batch": 2,
            "objectives.matryoshka.teacher_weight": teacher_weight,
        },
    )
    processor = QWEN2_5_VL.Processor(learned, QWEN2_5_VL.Images(28 * 28, 224 * 224), row_limits(settings))
    items = run_items(settings, processor, sources.training_records(settings.data, settings.seed))
    shape = plan_rows(items, row_limits(settings)).shape(0, 1)
    return training_batches(items, shape, model_config(settings).architecture.layout), items


def test_batches_have_the_numbers_of_their_pairs_or_none(tmp_path):
    scored = [row(n, teacher_scores=[n, n + 0.5, -n], labels=[2, 1, n % 2]) for n in range(6)]
    prepare(tmp_path, "scored", scored)
    prepare(tmp_path, "plain", [row(n) for n in range(6)])
    dataset, items = batches(tmp_path, ("scored", "plain"), 3, teacher_weight=0.5)
    for step in range(2):
        batch = dataset[step]
        for pair, reference in enumerate(items.references[step]):
            has = reference.source == 0
            expected = [*scored[reference.row]["teacher_scores"], np.nan] if has else [np.nan] * 4
            np.testing.assert_array_equal(batch.teacher_scores[pair], expected)
            np.testing.assert_array_equal(batch.labels[pair], [*scored[reference.row]["labels"], 0] if has else [1, 0, 0, 0])
    mesh = make_mesh(devices=jax.devices()[:1])
    moved = put(dataset[0], mesh)
    np.testing.assert_array_equal(np.asarray(moved.labels), dataset[0].labels)
    assert batches(tmp_path, ("scored",), 2)[0][0].teacher_scores is None  # no loss reads them
    for names, negatives, message in ((("plain",), 2, "no pair of plain has teacher_scores"), (("scored",), 0, "negatives is 0")):
        with pytest.raises(UserError, match=message):
            batches(tmp_path, names, negatives, teacher_weight=0.5)
        batch = batches(tmp_path, names, negatives)[0][0]
        assert batch.teacher_scores is None and batch.labels is None and put(batch, mesh).labels is None


def test_an_older_preparation_is_one_clear_error(tmp_path):
    prepare(tmp_path, "mine", [row(n) for n in range(4)])
    folder = tmp_path / "out" / "mine"
    (folder / preparation.VERSION).rename(folder / "2.0.0")
    marker = json.loads((folder / "2.0.0" / "prepared.json").read_text())
    (folder / "2.0.0" / "prepared.json").write_text(json.dumps(marker | {"version": "2.0.0"}))
    with pytest.raises(UserError, match="holds no complete preparation of a source 'mine': run `python -m metaembed_jax prepare"):
        sources.prepare("mine", tmp_path / "out")
