"""The choice of the worst queries, against sorting all of them."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.metrics import gold_of
from metaembed_jax.evaluation.sweep import sweep
from metaembed_jax.evaluation.worst import SHOWN, WORST, Example, Miss, Ranking, example, worst_queries


def rankings(scores, relevant):
    return [Ranking(np.arange(len(row)), row, right) for row, right in zip(scores, relevant, strict=True)]


@st.composite
def tables(draw):
    """Few different scores, so that there are many ties, infinities among them; each query has something that is right."""
    queries, candidates = draw(st.integers(1, 25)), draw(st.integers(1, 7))
    cells = st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 1.0, np.inf])
    scores = np.array(draw(st.lists(cells, min_size=queries * candidates, max_size=queries * candidates)))
    relevant = np.random.default_rng(draw(st.integers(0, 99))).random((queries, candidates)) < 0.3
    relevant[np.arange(queries), draw(st.integers(0, candidates - 1))] = True
    return scores.reshape(queries, candidates).astype(np.float32), relevant


@given(tables())
def test_the_worst_are_those_of_a_full_sort(table):
    scores, relevant = table
    ranks = [int(gold.ranks[0]) for gold in gold_of(scores, relevant)]
    expected = []
    for query, (row, right) in enumerate(zip(scores.tolist(), relevant, strict=True)):
        order = sorted(range(len(row)), key=lambda n: -row[n])
        wanted, others = [n for n in order if right[n]], [n for n in order if not right[n]]
        if ranks[query]:
            best, first = row[wanted[0]], row[others[0]]
            margin = 0 if best == first else first - best
            shown = [[(n, row[n]) for n in numbers] for numbers in (wanted[:SHOWN], others[: min(SHOWN, ranks[query])])]
            expected.append((-ranks[query], -margin, query, Miss(query, ranks[query], len(row), *shown)))
    worst = worst_queries(rankings(scores, relevant))
    assert worst == [entry[-1] for entry in sorted(expected, key=lambda entry: entry[:3])[:WORST]]
    assert all(row[n] >= row[miss.wanted[0][0]] for miss in worst for row in [scores[miss.query]] for n, _ in miss.found)


def test_a_tie_is_a_miss_and_ties_go_by_margin_then_row():
    scores = np.array([[1, 1, 0], [1, 2, 0], [0, 5, 0], [2, 1, 1], [1, 2, 0]], np.float32)
    worst = worst_queries(rankings(scores, np.arange(3)[None] == np.zeros((5, 1))))
    assert [(miss.query, miss.rank) for miss in worst] == [(2, 2), (1, 1), (4, 1), (0, 1)]
    assert worst[0] == Miss(2, 2, 3, [(0, 0.0)], [(1, 5.0), (2, 0.0)])
    assert worst[-1].found == [(1, 1.0)]


def test_candidates_keep_their_own_numbers():
    lists = [
        Ranking(np.array([7, 3]), np.array([0.0, 1.0]), np.array([True, False])),
        Ranking(*map(np.array, ([5], [1.0], [True]))),
    ]
    assert worst_queries(iter(lists)) == [Miss(0, 1, 2, [(7, 0.0)], [(3, 1.0)])]
    assert worst_queries([]) == []


def test_a_miss_survives_json_and_gets_its_items():
    scores = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    worst = worst_queries(rankings(scores, np.arange(8)[None] == np.arange(30)[:, None] % 8))
    read = [Miss(**one) for one in json.loads(json.dumps([miss._asdict() for miss in worst]))]
    assert len(read) == WORST and [miss.severity for miss in read] == [miss.severity for miss in worst]
    queries, candidates = ([{"text": f"{kind} {n}"} for n in range(30)] for kind in "qc")
    found = example(read[0], queries, candidates, "here")
    assert found == example(worst[0], queries, candidates, "here") and isinstance(found, Example)
    assert found.place == f"here, query {worst[0].query}" and found.query == queries[worst[0].query]
    assert found.wanted[0] == (candidates[worst[0].query % 8], worst[0].wanted[0][1])


@pytest.mark.parametrize(
    "scores, relevant, message",
    [([[1, 0], [np.nan, 1]], [[True, False]] * 2, "query 1 hold NaN"), ([[1, 0]], [[False, False]], "query 0 has no relevant")],
)
def test_what_has_no_rank_is_refused(scores, relevant, message):
    with pytest.raises(UserError, match=message):
        worst_queries(rankings(np.array(scores), np.array(relevant)))


def test_a_sweep_keeps_the_worst_of_its_dearest_budget():
    random = np.random.default_rng(1)
    query, candidate = random.normal(size=(20, 2, 4)).astype(np.float32), random.normal(size=(20, 4, 4)).astype(np.float32)
    relevance = np.eye(20, dtype=bool)
    found = sweep(query, candidate, relevance, [(2, 4), (1, 1)])["worst"]
    scores = np.einsum("qid,njd->qnij", query, candidate).max(-1).sum(-1)
    expected = worst_queries(rankings(scores, relevance))
    assert [(one["query"], one["rank"]) for one in found] == [(miss.query, miss.rank) for miss in expected] and len(found) == WORST
    assert found[0]["found"][0] == (expected[0].found[0][0], pytest.approx(expected[0].found[0][1], abs=1e-5))
