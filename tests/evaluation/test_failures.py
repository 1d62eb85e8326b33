"""The choice of the worst queries, against sorting all of them."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.failures import SHOWN, WORST, Ranking, with_items, worst_of, worst_queries
from metaembed_jax.evaluation.metrics import gold_of
from metaembed_jax.evaluation.sweep import sweep
from metaembed_jax.results import Failure, from_json, to_json


def rankings(scores, relevant):
    return [Ranking(np.arange(len(row)), row, right) for row, right in zip(scores, relevant, strict=True)]


@st.composite
def tables(draw):
    """Few different scores, so that there are many ties, infinities among them; each query has something that is right."""
    queries, documents = draw(st.integers(1, 25)), draw(st.integers(1, 7))
    cells = st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 1.0, np.inf])
    scores = np.array(draw(st.lists(cells, min_size=queries * documents, max_size=queries * documents)))
    relevant = np.random.default_rng(draw(st.integers(0, 99))).random((queries, documents)) < 0.3
    relevant[np.arange(queries), draw(st.integers(0, documents - 1))] = True
    return scores.reshape(queries, documents).astype(np.float32), relevant


@given(tables())
def test_the_worst_are_those_of_a_full_sort(table):
    scores, relevant = table
    ranks = [int(gold.ranks[0]) for gold in gold_of(scores, relevant)]
    expected = []
    for query, (row, right) in enumerate(zip(scores.tolist(), relevant, strict=True)):
        order = sorted(range(len(row)), key=lambda n: -row[n])
        rights, others = [n for n in order if right[n]], [n for n in order if not right[n]]
        if ranks[query]:
            best, first = row[rights[0]], row[others[0]]
            margin = 0 if best == first else first - best
            shown = [tuple((n, row[n]) for n in numbers) for numbers in (rights[:SHOWN], others[: min(SHOWN, ranks[query])])]
            failure = Failure(query=query, rank=ranks[query], among=len(row), right=shown[0], above=shown[1])
            expected.append((-ranks[query], -margin, query, failure))
    worst = worst_queries(rankings(scores, relevant))
    assert list(worst) == [entry[-1] for entry in sorted(expected, key=lambda entry: entry[:3])[:WORST]]
    for failure in worst:
        row = scores[failure.query]
        assert all(row[n] >= row[failure.right[0][0]] for n, _ in failure.above)


def test_a_tie_is_a_miss_and_ties_go_by_margin_then_row():
    scores = np.array([[1, 1, 0], [1, 2, 0], [0, 5, 0], [2, 1, 1], [1, 2, 0]], np.float32)
    worst = worst_queries(rankings(scores, np.arange(3)[None] == np.zeros((5, 1))))
    assert [(failure.query, failure.rank) for failure in worst] == [(2, 2), (1, 1), (4, 1), (0, 1)]
    assert worst[0] == Failure(query=2, rank=2, among=3, right=((0, 0.0),), above=((1, 5.0), (2, 0.0)))
    assert worst[-1].above == ((1, 1.0),)


def test_documents_keep_their_own_numbers():
    lists = [
        Ranking(np.array([7, 3]), np.array([0.0, 1.0]), np.array([True, False])),
        Ranking(*map(np.array, ([5], [1.0], [True]))),
    ]
    failure = Failure(dataset=("icons",), query=0, rank=1, among=2, right=((7, 0.0),), above=((3, 1.0),))
    assert worst_queries(iter(lists), ("icons",)) == (failure,)
    assert worst_queries([]) == ()


def test_a_failure_survives_json_and_gets_its_items():
    scores = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    worst = worst_queries(rankings(scores, np.arange(8)[None] == np.arange(30)[:, None] % 8), ("here", "test"))
    read = [from_json(Failure, content) for content in json.loads(json.dumps([to_json(failure) for failure in worst]))]
    assert read == list(worst) and len(read) == WORST and worst_of(reversed(read)) == read
    queries, documents = ([{"text": f"{kind} {n}"} for n in range(30)] for kind in "qd")
    failed = with_items(read[0], queries, documents)
    assert failed.origin == f"here, test, query {worst[0].query}" and failed.query == queries[worst[0].query]
    assert failed.right[0] == (documents[worst[0].query % 8], worst[0].right[0][1])


@pytest.mark.parametrize(
    "scores, relevant, message",
    [([[1, 0], [np.nan, 1]], [[True, False]] * 2, "query 1 hold NaN"), ([[1, 0]], [[False, False]], "query 0 has no relevant")],
)
def test_a_query_without_a_rank_is_refused(scores, relevant, message):
    with pytest.raises(UserError, match=message):
        worst_queries(rankings(np.array(scores), np.array(relevant)))


def test_a_sweep_keeps_the_worst_of_its_dearest_budget():
    random = np.random.default_rng(1)
    query, document = random.normal(size=(20, 2, 4)).astype(np.float32), random.normal(size=(20, 4, 4)).astype(np.float32)
    relevance = np.eye(20, dtype=bool)
    failures = sweep("icons", query, document, relevance, [(2, 4), (1, 1)]).forward.failures
    scores = np.einsum("qid,njd->qnij", query, document).max(-1).sum(-1)
    expected = worst_queries(rankings(scores, relevance), ("icons",))
    assert [(f.dataset, f.query, f.rank) for f in failures] == [(f.dataset, f.query, f.rank) for f in expected]
    assert len(failures) == WORST
    assert failures[0].above[0] == (expected[0].above[0][0], pytest.approx(expected[0].above[0][1], abs=1e-5))
