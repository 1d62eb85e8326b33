"""The worst queries of a task, against sorting all scores by another implementation of MaxSim, and what counts for a query."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("mteb")

from metaembed_jax.check.references import maxsim_scores
from metaembed_jax.evaluation.mteb import worst
from metaembed_jax.evaluation.mteb.run import evaluate_task
from metaembed_jax.evaluation.mteb.searcher import Scores, Searcher
from metaembed_jax.evaluation.worst import Miss
from tests.evaluation.mteb.pages import OtherPages, Pages, picture


class Gaps(Pages):
    """Of the second question nothing is known, and the fourth has no answer."""

    metadata = OtherPages.metadata.model_copy(update={"name": "Gaps"})

    def split(self, subset, grades):
        data = super().split(subset, grades)
        del data["relevant_docs"]["q1"]
        data["relevant_docs"]["q3"] = {"p5": 0, "elsewhere": 1}
        return data


def image(n):
    return {"image": picture(n, ("RGB", "RGBA", "L", "P")[n % 4])}


def by_hand(model, task):
    """(rank, margin, place, query, [(item, score)] right, the same of others) of all misses, worst first."""
    misses = []
    pages = model.encode_document([image(n) for n in range(12)])
    for subset in ("english", "french"):
        data = task.dataset[subset]["test"]
        scores = maxsim_scores(model.encode_query(data["queries"]["text"]), pages)
        for q, row in enumerate(scores):
            grades = data["relevant_docs"].get(f"q{q}", {})
            order = sorted(range(12), key=lambda n: -row[n])
            right = [n for n in order if grades.get(f"p{n}", 0) > 0]
            if right and order[0] != right[0]:
                found = list(order[: order.index(right[0])])
                place = f"Gaps, test, {subset}, query {q}"
                text = data["queries"]["text"][q]
                misses.append((len(found), row[found[0]] - row[right[0]], place, text, right[:3], found[:3], row))
    return sorted(misses, key=lambda miss: miss[:2], reverse=True)


def test_the_right_items_of_the_worst_queries(model):
    task = Gaps()
    done = evaluate_task(Searcher(model), task, [((1, 1),), ((16, 64),), ((2, 2, 3), (4, 4))])
    assert not task.data_loaded
    shown = worst.examples({task: done})
    assert not task.data_loaded
    task.load_data()
    expected = by_hand(model, task)[:10]
    assert len(shown) == len(done["worst"]) == len(expected) >= 5
    for one, (rank, _, place, text, right, found, row) in zip(shown, expected, strict=True):
        assert (one.rank, one.among, one.place, one.query) == (rank, 12, place, {"text": text})
        assert [item for item, _ in one.wanted] == [image(n) for n in right]
        assert [item for item, _ in one.found] == [image(n) for n in found]
        assert [score for _, score in one.wanted + one.found] == pytest.approx([row[n] for n in right + found], abs=1e-5)
    assert not any(f"query {q}" in one.place for one in shown for q in (1, 3, 7))


def ranked(query, candidates, row, task):
    """The candidates that count, as a list that mteb would make of them."""
    counted = {name: score for name, score in zip(candidates, row, strict=True) if score > -np.inf}
    if task.ignore_identical_ids:
        counted.pop(query, None)
    return sorted(counted, key=counted.get, reverse=True)[1 if task.skip_first_result else 0 :], counted


@pytest.mark.parametrize("identical", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_what_counts_is_what_mteb_ranks(identical, skip):
    """Many ties, candidates that are not asked about, that are not there, or that are the query; queries without an answer."""
    task, tried = SimpleNamespace(ignore_identical_ids=identical, skip_first_result=skip), 0
    for seed in range(30):
        random = np.random.default_rng(seed)
        queries, candidates = [f"{n}" for n in range(8)], [f"{n}" for n in (7, 1, 9, 0, 12)]
        scores = random.integers(0, 4, (8, 5)).astype(np.float32)
        scores[random.random((8, 5)) < 0.2] = -np.inf
        judged = {q: {c: int(random.integers(0, 3)) for c in [*candidates, "3"] if random.random() < 0.4} for q in queries[1:]}
        expected = {}
        for row, query in enumerate(queries):
            order, counted = ranked(query, candidates, scores[row], task)
            right = [name for name in order if judged.get(query, {}).get(name, 0) > 0]
            others = [name for name in order if name not in right]
            if right and (rank := sum(counted[name] >= counted[right[0]] for name in others)):
                expected[row] = rank, len(order), candidates.index(right[0]), candidates.index(others[0])
        found = worst.misses(task, judged, Scores(queries, candidates, scores))
        assert {miss.query: (miss.rank, miss.among, miss.wanted[0][0], miss.found[0][0]) for miss in found} == expected
        assert all(isinstance(miss, Miss) and type(miss.query) is int for miss in found)
        tried += len(found)
    assert tried > 30


def test_nothing_to_look_for():
    task = SimpleNamespace(ignore_identical_ids=True, skip_first_result=True)
    assert worst.misses(task, {}, Scores(["a"], ["a"], np.ones((1, 1)))) == []
    assert worst.misses(task, {"a": {"b": 1}}, Scores(["a"], [], np.ones((1, 0)))) == []
