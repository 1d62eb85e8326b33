"""Calibrated survivors against their definition in float64, and how an index keeps them."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import metaembed_jax as me
from metaembed_jax.late_interaction.budgets import search_name
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.mesh import make_mesh
from metaembed_jax.retrieval import calibration
from metaembed_jax.retrieval.calibration import calibrated_stages, choose_rank
from metaembed_jax.retrieval.manifest import Calibration
from tests.retrieval.fake_model import FakeModel
from tests.retrieval.reference import exact, search, unit

ONE = make_mesh(devices=jax.devices()[:1])
STORED = Calibration(Budget(1, 1), Budget(4, 8), 10, 0.99, 0.95, 100, 299, 1000)


def cdf(successes, queries, share):
    return sum(math.comb(queries, n) * share**n * (1 - share) ** (queries - n) for n in range(successes + 1))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 400), st.sampled_from([0.5, 0.9, 0.95, 0.99]), st.sampled_from([0.6, 0.9, 0.95]))
def test_the_rank_is_the_least_that_is_sure_enough(queries, coverage, confidence):
    try:
        rank = choose_rank(queries, coverage, confidence)
    except me.UserError:
        assert not queries or cdf(queries - 1, queries, coverage) < confidence
    else:
        assert cdf(rank - 1, queries, coverage) >= confidence and (rank == 1 or cdf(rank - 2, queries, coverage) < confidence)


def test_samples_that_are_too_small_are_refused():
    assert choose_rank(299, 0.99, 0.95) == 299
    with pytest.raises(me.UserError, match="298 queries: expected at least 299 for coverage=0.99 with confidence=0.95; give more"):
        choose_rank(298, 0.99, 0.95)
    with pytest.raises(me.UserError, match="0 queries: expected at least 1 for coverage=0.4 with confidence=0.5"):
        choose_rank(0, 0.4, 0.5)
    for name, share in (("coverage", 1), ("coverage", 0), ("confidence", 1.0), ("confidence", "high"), ("coverage", float("nan"))):
        with pytest.raises(me.UserError, match=f"{name}=.*: expected a share between 0 and 1"):
            choose_rank(1000, **{"coverage": 0.9, "confidence": 0.9, name: share})


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 9, 50]), st.booleans(), st.sampled_from([0.5, 0.9]))
def test_equal_to_the_definition(seed, documents, ties, coverage):
    rng = np.random.default_rng(seed)
    make = exact if ties else unit
    query, document = make(rng, 24, 3, 16), make(rng, documents, 3, 16)
    k, first = min([1, 4, 8][rng.integers(3)], documents), [(1, 1), (1, 1, 4)][rng.integers(2)]
    index = me.Index.build(document, dtype="float32", mesh=ONE)
    result = index.calibrate(query, first, (3, 3), k=k, coverage=coverage, confidence=0.9)
    _, best_Qk = search(query, document, k, [(3, 3)])
    _, ranked_QN = search(query, document, documents, [first])
    needed = [
        max(int(np.flatnonzero(ranked == row)[0]) + 1 for row in best) for ranked, best in zip(ranked_QN, best_Qk, strict=True)
    ]
    rank = choose_rank(24, coverage, 0.9)
    assert result == Calibration(Budget(*first), Budget(3, 3), k, coverage, 0.9, sorted(needed)[rank - 1], 24, documents)
    whole, staged = index.search(query, k, (3, 3)).ids, index.search(query, k, "auto").ids
    kept = (whole == staged).all(1).tolist()
    assert sum(kept) >= rank and kept == [number <= result.survivors for number in needed]


def test_ranks_come_from_searches_of_growing_depth(monkeypatch):
    rng = np.random.default_rng(1)
    query, document = unit(rng, 40, 4, 8), unit(rng, 300, 9, 8)
    index = me.Index.build(document, dtype="float32", mesh=ONE)
    index.delete(["5", "80"])
    whole = index.calibrate(query, (1, 1), (4, 9), k=3, coverage=0.8, confidence=0.8)
    for name, value in {"FIRST_DEPTH": 4, "DEPTH_FACTOR": 8, "RANKED_ITEMS": 128}.items():
        monkeypatch.setattr(calibration, name, value)
    assert index.calibrate(query, (1, 1), (4, 9), k=3, coverage=0.8, confidence=0.8) == whole
    assert 3 < whole.survivors < 298 and whole.items == 298


def test_a_calibration_is_stored_and_kept(tmp_path):
    rng = np.random.default_rng(2)
    query, document = unit(rng, 30, 4, 8), unit(rng, 50, 9, 8)
    index = me.Index.build(document, path=tmp_path / "index", mesh=ONE)
    stale = me.Index.load(tmp_path / "index", mesh=ONE)
    first = index.calibrate(query, (1, 1), (4, 9), k=5, coverage=0.8, confidence=0.8)
    index.calibrate(query[:20], (2, 4), (4, 9), k=5, coverage=0.8, confidence=0.8)
    second = index.calibrate(query, (2, 4), (4, 9), k=5, coverage=0.8, confidence=0.8)
    narrow = index.calibrate(query, (2, 4, 3), (4, 9), k=5, coverage=0.8, confidence=0.8)
    assert '"first": [\n     2,\n     4\n    ]' in (text := (tmp_path / "index/manifest.json").read_text())  # as before widths
    assert '"first": [\n     2,\n     4,\n     3\n    ]' in text
    index.add(unit(rng, 50, 9, 8), [f"new {n}" for n in range(50)])
    index.delete(["3"])
    index.compact()
    index.save(tmp_path / "copy")
    for folder in ("index", "copy"):
        loaded = me.Index.load(tmp_path / folder, mesh=ONE)
        assert loaded.calibrations == (first, second, narrow)
        (budget, survivors), last = loaded.calibrated_stages(5)
        chosen = {(1, 1): first, (2, 4): second, (2, 4, 3): narrow}[budget.sizes]
        assert last.sizes == (4, 9) and survivors == math.ceil(chosen.survivors * 99 / 50)
        explicit = loaded.search(query, 4, [(*budget.sizes, survivors), (4, 9)])
        np.testing.assert_array_equal(loaded.search(query, 4, "auto").ids, explicit.ids)
    with pytest.raises(me.UserError, match="this index is not calibrated; call `index.calibrate`"):
        stale.search(query, 3, "auto")
    me.Index.build(document, path=tmp_path / "index", mesh=ONE)
    assert me.Index.load(tmp_path / "index", mesh=ONE).calibrations == ()


def test_the_cheapest_calibration_of_the_largest_budget_is_used():
    def stages(*calibrations, k=10, items=1000):
        return search_name(calibrated_stages(calibrations, k, items, 8))

    cheap, small = (
        dataclasses.replace(STORED, first=Budget(2, 4), survivors=20),
        dataclasses.replace(STORED, last=Budget(2, 4), survivors=10),
    )
    narrow = dataclasses.replace(STORED, first=Budget(1, 1, 2), survivors=110)
    assert stages(STORED) == "1:1:100>4:8"
    assert stages(STORED, cheap, small) == stages(small, STORED, cheap) == "1:1:100>4:8"
    assert stages(dataclasses.replace(STORED, survivors=400), cheap) == "2:4:20>4:8"
    assert stages(STORED, narrow) == "1:1x2:110>4:8" and stages(STORED, dataclasses.replace(narrow, survivors=200)) == "1:1:100>4:8"
    assert stages(dataclasses.replace(STORED, last=Budget(4, 8, 7)), narrow) == "1:1x2:110>4:8"
    assert stages(STORED, items=1001) == "1:1:101>4:8" and stages(STORED, items=60) == "1:1:60>4:8"
    assert stages(STORED, dataclasses.replace(STORED, k=20, survivors=150), k=11) == "1:1:150>4:8"
    with pytest.raises(
        me.UserError, match="budget='auto' with k=11: expected at most 10, the k of the calibration; calibrate again"
    ):
        stages(STORED, k=11)
    wrong_numbers: list = ["10", 0, 1.5]
    for wrong in wrong_numbers:
        with pytest.raises(me.UserError, match="k=.*: expected a positive integer"):
            stages(STORED, k=wrong)


def test_wrong_calibrations_are_refused():
    rng = np.random.default_rng(3)
    index, query = me.Index.build(unit(rng, 20, 9, 8), mesh=ONE), unit(rng, 10, 4, 8)
    wrong: list[tuple] = [
        (((1, 1), (4, 9)), {"k": 21, "coverage": 0.5}, "k=21: expected 1 to 20"),
        (((1, 1), (4, 9)), {"k": 0, "coverage": 0.5}, "k=0"),
        (((1, 1), (4, 9)), {}, "10 queries: expected at least 299"),
        (((1, 1), (4, 10)), {}, "goes beyond the vectors given"),
        (((1, 1, 20), (4, 9)), {}, "a width beyond"),
        (((1, 1), [(1, 1, 20), (4, 9)]), {}, "expected a pair"),
    ]
    for arguments, options, message in wrong:
        with pytest.raises(me.UserError, match=message):
            index.calibrate(query, *arguments, **options)
    with pytest.raises(me.UserError, match=r"shape \(10, 4, 7\)"):
        index.calibrate(query[..., :7], (1, 1), (4, 9))
    assert index.calibrations == ()


def test_an_index_that_follows_its_documents_keeps_its_calibrations(tmp_path, capsys):
    table, model = tmp_path / "rows.jsonl", FakeModel()

    def index(count, exact):
        table.write_text("".join(json.dumps({"id": f"{n}", "text": f"text {n}"}) + "\n" for n in range(count)))
        documents = me.open_documents(table)
        built = me.index_documents(model, documents, tmp_path / "index", dtype="int8", exact=exact, progress=True)
        return built, capsys.readouterr().out

    built, output = index(20, "float32")
    result = built.calibrate(unit(np.random.default_rng(4), 30, 2, 8), (1, 1), (2, 4), k=2, coverage=0.8, confidence=0.8)
    for count, is_told in ((22, False), (23, True)):
        built, output = index(count, "float32")
        assert built.calibrations == (result,) and f"{count} items" in output
        assert ("it was calibrated on 20 items; run `metaembed calibrate` again" in output) == is_told
    built, output = index(23, "bfloat16")  # vectors of other types are another index
    assert built.calibrations == () and model.count() == 20 + 2 + 1 + 23
