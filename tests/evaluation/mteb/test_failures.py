"""The worst queries of a task, against sorting all scores by another implementation of MaxSim, and what counts for a query."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("mteb")

from metaembed_jax.check.references import maxsim_scores
from metaembed_jax.evaluation.mteb.evaluator import Mteb, evaluate_task
from metaembed_jax.evaluation.mteb.failures import task_failures
from metaembed_jax.evaluation.mteb.scores import Scores
from metaembed_jax.evaluation.mteb.searcher import Searcher
from metaembed_jax.evaluation.mteb.tasks import Benchmark
from metaembed_jax.late_interaction.budgets import parse_searches
from tests.evaluation.mteb.pages import OtherPages, Pages, picture


class Gaps(Pages):
    """The second question has no known answer, and the fourth has none."""

    metadata = OtherPages.metadata.model_copy(update={"name": "Gaps"})

    def split(self, subset, grades):
        data = super().split(subset, grades)
        del data["relevant_docs"]["q1"]
        data["relevant_docs"]["q3"] = {"p5": 0, "elsewhere": 1}
        return data


def image(n):
    return {"image": picture(n, ("RGB", "RGBA", "L", "P")[n % 4])}


def by_hand(model, task):
    """(rank, margin, origin, query, [(item, score)] right, the same of others) of all misses, worst first."""
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
                above = list(order[: order.index(right[0])])
                origin = f"Gaps, test, {subset}, query {q}"
                text = data["queries"]["text"][q]
                misses.append((len(above), row[above[0]] - row[right[0]], origin, text, right[:3], above[:3], row))
    return sorted(misses, key=lambda miss: miss[:2], reverse=True)


def test_the_right_items_of_the_worst_queries(model):
    task = Gaps()
    results = evaluate_task(Searcher(model), task, parse_searches("1:1,16:64,2:2:3>4:4", model.largest_budget))
    assert not task.data_loaded and (results.queries, results.documents) == (2 * 6, 2 * 12)
    evaluator = Mteb("gaps", [(1, 1)])
    evaluator.benchmarks = [Benchmark("gaps", [task], [])]
    shown = evaluator.show(results.failures)
    assert not task.data_loaded
    task.load_data()
    expected = by_hand(model, task)[:10]
    assert len(shown) == len(results.failures) == len(expected) >= 5
    for failed, (rank, _, origin, text, right, above, row) in zip(shown, expected, strict=True):
        assert (failed.rank, failed.among, failed.origin, failed.query) == (rank, 12, origin, {"text": text})
        assert [item for item, _ in failed.right] == [image(n) for n in right]
        assert [item for item, _ in failed.above] == [image(n) for n in above]
        assert [score for _, score in failed.right + failed.above] == pytest.approx([row[n] for n in right + above], abs=1e-5)
    assert not any(f"query {q}" in failed.origin for failed in shown for q in (1, 3, 7))


def ranked(query, documents, row, task):
    """The documents that count, as a list that mteb would make of them."""
    counted = {name: score for name, score in zip(documents, row, strict=True) if score > -np.inf}
    if task.ignore_identical_ids:
        counted.pop(query, None)
    return sorted(counted, key=counted.get, reverse=True)[1 if task.skip_first_result else 0 :], counted


@pytest.mark.parametrize("identical", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_what_counts_is_what_mteb_ranks(identical, skip):
    """Many ties, documents that are not asked about, that are not there, or that are the query; queries without an answer."""
    task, tried = SimpleNamespace(ignore_identical_ids=identical, skip_first_result=skip), 0
    for seed in range(30):
        random = np.random.default_rng(seed)
        queries, documents = [f"{n}" for n in range(8)], [f"{n}" for n in (7, 1, 9, 0, 12)]
        scores = random.integers(0, 4, (8, 5)).astype(np.float32)
        scores[random.random((8, 5)) < 0.2] = -np.inf
        judged = {q: {c: int(random.integers(0, 3)) for c in [*documents, "3"] if random.random() < 0.4} for q in queries[1:]}
        expected = {}
        for row, query in enumerate(queries):
            order, counted = ranked(query, documents, scores[row], task)
            right = [name for name in order if judged.get(query, {}).get(name, 0) > 0]
            others = [name for name in order if name not in right]
            if right and (rank := sum(counted[name] >= counted[right[0]] for name in others)):
                expected[row] = rank, len(order), documents.index(right[0]), documents.index(others[0])
        failures = task_failures(task, judged, Scores(queries, documents, scores))
        assert {f.query: (f.rank, f.among, f.right[0][0], f.above[0][0]) for f in failures} == expected
        assert all(type(failure.query) is int for failure in failures)
        tried += len(failures)
    assert tried > 30


def test_nothing_to_look_for():
    task = SimpleNamespace(ignore_identical_ids=True, skip_first_result=True)
    assert task_failures(task, {}, Scores(["a"], ["a"], np.ones((1, 1)))) == []
    assert task_failures(task, {"a": {"b": 1}}, Scores(["a"], [], np.ones((1, 0)))) == []
