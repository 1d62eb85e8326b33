"""Mined sources: their negatives against all scores by NumPy, their other splits, kills, and errors."""

import json

import jax
import numpy as np
import pytest

import metaembed_jax as me
from metaembed_jax.data import sources
from metaembed_jax.data.sources import preparation, records, shards
from metaembed_jax.encoding.blocks import EncodedBlock
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.stages import as_stages
from metaembed_jax.mesh import make_mesh
from metaembed_jax.mining import blocks
from metaembed_jax.mining.mine import FOLDER, Mining, check_names, mine
from metaembed_jax.mining.selection import Selection
from metaembed_jax.retrieval import parts
from tests.data.field_files import write_pairs
from tests.retrieval.fake_model import FakeModel
from tests.retrieval.reference import unit

WIDTH, VECTORS, PAIRS = 8, 2, 60


def vectors(item):
    """Vectors of a text: those of equal texts are equal, and those of a query are near those of its answers."""
    text = item["text"]
    topic = unit(np.random.default_rng(int(text[1:]) % 10), VECTORS, WIDTH)
    mixed = topic + 0.7 * unit(np.random.default_rng([ord(text[0]), int(text[1:])]), VECTORS, WIDTH)
    return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


class TextModel(FakeModel):
    """A model of texts without a network."""

    def encode_blocks(self, items, side, *, budget, size=None, start=0, bar=None, allow_failures=False):
        size = size or max(len(items), 1)
        for first in range(start, len(items), size):
            numbers = range(first, min(first + size, len(items)))
            self.encoded += [items[number]["text"] for number in numbers]
            array = np.array([vectors(items[number]) for number in numbers], np.float32)
            yield EncodedBlock(numbers, np.array(numbers), array[:, :budget], {})


def pairs():
    """Every fifth query repeats an earlier one, and every seventh positive; some pairs have further positives and negatives."""
    rows = []
    for number in range(PAIRS):
        query = number - number % 5 if number % 5 == 1 else number
        positive = number - 7 if number % 7 == 3 and number > 7 else number
        row = {"query": f"q{query}", "positive": f"d{positive}", "negatives": [f"n{number}"]}
        if number % 9 == 0:
            row |= {"negatives": [f"n{number}", f"d{(number + 10) % PAIRS}"], "labels": [1, 0, 0.5], "teacher_scores": [3, 1, 2]}
        rows.append(row)
    return rows


@pytest.fixture
def data(tmp_path):
    """The folder of sources, with `texts` of the rows of `pairs`."""
    write_pairs(tmp_path / "texts.jsonl", pairs())
    sources.prepare_from("pairs", tmp_path / "texts.jsonl", tmp_path / "data", 0, 0)
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_QUERIES", 16)
    monkeypatch.setattr(blocks, "PAIRS_AT_ONCE", 8)


def mining(data, out="mined", stages=((VECTORS, VECTORS),), source="texts", **selection):
    selection = Selection(**({"negatives": 3} | selection))
    stages = as_stages(stages, Budget(VECTORS, VECTORS, WIDTH))
    return Mining(source=source, out=out, data_dir=data, selection=selection, stages=stages, model="runs/x", step=7)


def read(data, name, split="train"):
    return list(records.open_split(data / name, preparation.VERSION, split))


def files_of(data, name="mined"):
    """All files of a complete source."""
    return {
        file.relative_to(data / name): file.read_bytes()
        for file in sorted((data / name / preparation.VERSION).rglob("*"))
        if file.is_file() and not file.name.startswith("sizes")
    }


def expected(records_of_split, chosen, survivors=None):
    """The texts of each pair's negatives, from the scores of all documents, or of the survivors by their first vectors."""
    texts = list(dict.fromkeys(item["text"] for r in records_of_split for item in (r["positive"], *r["negatives"])))
    stored = np.array([vectors({"text": text}) for text in texts], np.float32).astype("bfloat16").astype(np.float32)
    answers = {}
    for record in records_of_split:
        further = [item["text"] for item, label in zip(record["negatives"], record.get("labels", [0])[1:], strict=False) if label]
        answers.setdefault(record["query"]["text"], set()).update([record["positive"]["text"], *further])
    result = []
    for record in records_of_split:
        similarity = np.einsum("qd,nrd->nqr", vectors(record["query"]), stored)
        scores = similarity.max(2).sum(1)
        positive = scores[texts.index(record["positive"]["text"])]
        limit = positive - max(chosen.margin * VECTORS, chosen.relative_margin * abs(positive))
        kept = np.argsort(-similarity[:, 0, 0], kind="stable")[:survivors]
        ranked = [n for n in np.argsort(-scores, kind="stable") if n in kept]
        others = [n for n in ranked if texts[n] not in answers[record["query"]["text"]]]
        window = others[chosen.range_min : chosen.last]
        result.append([texts[n] for n in window if scores[n] <= limit][: chosen.negatives])
    return result


NARROW, ABSOLUTE = {"range_min": 2, "range_max": 6}, {"margin": 0.2, "relative_margin": 0.0}


@pytest.mark.parametrize("chosen", [{}, NARROW, ABSOLUTE, {"relative_margin": 0.4, "negatives": 5}])
def test_negatives_are_the_best_documents_that_pass(data, chosen, capsys):
    job, base = mining(data, **chosen), read(data, "texts")
    mine(job, TextModel())
    mined, lists = read(data, "mined"), expected(base, job.selection)
    for record, before, negatives in zip(mined, base, lists, strict=True):
        further = [before["negatives"][1]["text"]] if "labels" in before else []
        assert [item["text"] for item in record["negatives"]] == further + negatives
        assert record["query"] == before["query"] and record["positive"] == before["positive"]
        if further:
            assert record["labels"] == [1, 0.5, *[0] * len(negatives)]
            np.testing.assert_array_equal(record["teacher_scores"], [3, 2, *[np.nan] * len(negatives)])
    marker = records.read_marker(data / "mined", preparation.VERSION)
    counts = marker["mined"]
    assert counts["mined"] == sum(map(len, lists)) and counts["fewer"] == sum(len(n) < job.selection.negatives for n in lists)
    assert counts["none"] == lists.count([]) and counts["step"] == 7 and counts["model_fingerprint"] == "f" * 16
    assert counts["source_fingerprint"] == sources.prepare("texts", data)["fingerprint"]
    shown = capsys.readouterr().out
    assert f"{counts['mined']:,} mined; left out: {counts['answers']:,} that answer the query" in shown


def test_the_other_splits_stay_and_the_source_trains_as_any(data):
    mine(mining(data), TextModel())
    for split in records.HELD_OUT_SPLITS:
        assert read(data, "mined", split) == read(data, "texts", split) != []
        assert sources.retrieval("mined", data, split) == sources.retrieval("texts", data, split)
    before, after = sources.prepare("texts", data), sources.prepare("mined", data)
    assert after["held_out"] == before["held_out"] and after["rows"] == before["rows"]
    settings = me.config.DataConfig(dir=str(data), sources=(("mined", 1.0, 0),), negatives=3)
    (training,) = sources.training_records(settings, 0)
    assert training.describe(0)["negatives"] == training[0]["negatives"]


def test_killed_at_any_point_and_run_again_it_writes_the_same_files(data, monkeypatch):
    mine(mining(data), TextModel())
    whole, other = files_of(data), data.parent / "other"
    write_pairs(data.parent / "texts.jsonl", pairs())
    sources.prepare_from("pairs", data.parent / "texts.jsonl", other, 0, 0)

    class Killed(BaseException):
        pass

    for target, name, times in ((parts, "_write", 0), (blocks.MinedBlock, "write", 2), (shards, "write_shard", 0)):
        calls, real = [], getattr(target, name)

        def until(*arguments, calls=calls, real=real, times=times):
            calls.append(1)
            if len(calls) > times:
                raise Killed
            return real(*arguments)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(target, name, until)
            mine(mining(other), TextModel())
        assert (other / "mined" / FOLDER).is_dir() and not (other / "mined" / preparation.VERSION).exists()
    model = TextModel()
    mine(mining(other), model)
    assert not model.encoded  # all that was encoded before the last kill is kept
    assert files_of(other) == whole and not (other / "mined" / FOLDER).exists()


def test_a_finished_one_is_said_and_one_with_other_settings_replaced(data, capsys):
    mine(mining(data), TextModel())
    capsys.readouterr()
    before, model = files_of(data), TextModel()
    mine(mining(data), model)
    assert "is complete: it was mined with this model" in capsys.readouterr().out
    assert not model.encoded and files_of(data) == before
    mine(mining(data, negatives=2), TextModel())
    assert "was mined with another model, source or settings, and is replaced" in capsys.readouterr().out
    assert max(len(record["negatives"]) for record in read(data, "mined") if "labels" not in record) == 2


def test_one_device_and_eight_mine_the_same(data, monkeypatch):
    mine(mining(data), TextModel())
    monkeypatch.setattr(blocks, "make_mesh", lambda: make_mesh(devices=jax.devices()[:1]))
    mine(mining(data, out="alone"), TextModel(mesh=make_mesh(devices=jax.devices()[:1])))
    assert json.dumps(read(data, "alone")) == json.dumps(read(data, "mined"))  # as texts, where NaN is NaN


def test_stages_mine_what_survives(data):
    job = mining(data, stages=((1, 1, 40), (VECTORS, VECTORS)))
    mine(job, TextModel())
    for record, negatives in zip(read(data, "mined"), expected(read(data, "texts"), job.selection, survivors=40), strict=True):
        assert [item["text"] for item in record["negatives"]][-len(negatives) or 2 :] == negatives
    with pytest.raises(me.UserError, match="--budget: 20 survivors; expected at least --range-max=30"):
        mine(mining(data, out="few", stages=((1, 1, 20), (VECTORS, VECTORS))), TextModel())


@pytest.mark.parametrize(
    "selection, message",
    [
        ({"negatives": 0}, "--negatives=0: expected at least 1"),
        ({"range_min": 5, "range_max": 6}, "--range-max=6: expected at least 8, for --negatives=3 after --range-min=5"),
        ({"margin": -1.0}, "--margin=-1.0: expected a number of 0 or more"),
        ({"relative_margin": float("nan")}, "--relative-margin=nan: expected a number of 0 or more"),
    ],
)
def test_a_wrong_selection_is_one_error(selection, message):
    with pytest.raises(me.UserError, match=message):
        Selection(**({"negatives": 3} | selection))


def test_wrong_names_and_margins_are_errors(data):
    for out, message in (("a/b", "expected a name"), ("texts", "another source"), ("icons", "another source"), (".x", "a name")):
        with pytest.raises(me.UserError, match=message):
            check_names("texts", out, data)
    with pytest.raises(me.UserError, match="is a prepared source that was not mined"):
        check_names("other", "texts", data)
    mine(mining(data, out="others"), TextModel())
    write_pairs(data.parent / "others.jsonl", pairs())
    with pytest.raises(me.UserError, match="is prepared already, from mined negatives; remove it, or choose another --out"):
        sources.prepare_from("pairs", data.parent / "others.jsonl", data, 0, 0)
    with pytest.raises(me.UserError, match="no document passes: of the results of"):
        mine(mining(data, relative_margin=5.0), TextModel())
    with pytest.raises(me.UserError, match="holds no complete preparation of a source 'nothing'"):
        mine(mining(data, source="nothing"), TextModel())
