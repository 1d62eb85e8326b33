"""The metrics against pytrec_eval, against brute force (ties), and the bootstrap against its definition."""

import itertools

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from metaembed_jax.errors import UserError
from metaembed_jax.evaluation import metrics


@st.composite
def rankings(draw, documents: int, values: int, grades: int = 1):
    """scores [Q, N] of so many values, and relevance: bool, or grades from 0; at least one relevant document per query."""
    queries, documents = draw(st.integers(1, 5)), draw(st.integers(1, documents))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = np.linspace(-3, 80, values)[random.integers(values, size=(queries, documents))]
    relevant = random.random((queries, documents)) < draw(st.sampled_from([0.05, 0.3, 0.9]))
    relevant[np.arange(queries), random.integers(documents, size=queries)] = True
    if grades > 1:
        relevant = relevant * random.integers(1, grades + 1, relevant.shape)
    return scores.astype(draw(st.sampled_from([np.float32, np.float64]))), relevant


def pytrec_eval_of(scores, relevance):
    """{measure: [Q]}. It ranks the last id first among equal scores, so the least relevant have the last ids."""
    ids = [[f"{9 - grade} {n:03}" for n, grade in enumerate(row.astype(int))] for row in relevance]
    qrels = {f"{q}": {i: int(grade) for i, grade in zip(ids[q], row, strict=True)} for q, row in enumerate(relevance)}
    run = {f"{q}": {i: float(score) for i, score in zip(ids[q], row, strict=True)} for q, row in enumerate(scores)}
    measures = {"success.1,5,10", "P.1", "ndcg_cut.1,5,10"}
    values = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
    return {measure: [values[f"{q}"][measure] for q in range(len(scores))] for measure in values["0"]}


@pytest.mark.parametrize("values", [3, 8, 1000], ids=["ties", "some ties", "few ties"])
@pytest.mark.parametrize("grades", [1, 3])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_equal_to_pytrec_eval(values, grades, data):
    scores, relevance = data.draw(rankings(30, values, grades))
    expected, gold = pytrec_eval_of(scores, relevance), metrics.gold_of(scores, relevance)
    ours = {f"success_{k}": metrics.hit_at(gold, k) for k in (1, 5, 10)} | {"P_1": metrics.hit_at(gold, 1)}
    ours |= {f"ndcg_cut_{k}": metrics.ndcg_at(gold, k) for k in (1, 5, 10)}
    assert ours.keys() == expected.keys()
    for measure in ours:
        np.testing.assert_allclose(ours[measure], expected[measure], rtol=0, atol=1e-9)
    names = {"R@1": "success_1", "R@5": "success_5", "R@10": "success_10", "nDCG@10": "ndcg_cut_10"}
    for name, values in metrics.evaluate(scores, relevance).items():
        np.testing.assert_array_equal(values, ours[names[name]])


@settings(deadline=None, max_examples=30)
@given(rankings(6, 3, 3), st.integers(1, 4))
def test_ties_are_the_worst_of_all_admissible_orders(ranking, k):
    scores, grades = ranking
    gold = metrics.gold_of(scores, grades)
    for q, (row, gains) in enumerate(zip(scores, grades, strict=True)):
        orders = [
            list(order)
            for order in itertools.permutations(range(len(row)))
            if all(row[a] >= row[b] for a, b in itertools.pairwise(order))
        ]
        discount = 1 / np.log2(np.arange(2, k + 2))
        ideal = sum(np.sort(gains)[::-1][:k] * discount[: len(row)])
        assert metrics.hit_at(gold, k)[q] == min((gains[order[:k]] > 0).any() for order in orders)
        worst = min(sum(gains[order[:k]] * discount[: len(row)]) for order in orders)
        assert metrics.ndcg_at(gold, k)[q] == pytest.approx(worst / ideal, abs=1e-12)


def test_one_score_for_all_finds_nothing():
    per_query = metrics.evaluate(np.zeros((3, 20)), [{0}, {7, 8}, {19}])
    assert not any(values.any() for values in per_query.values())


def test_one_query_one_document():
    per_query = metrics.evaluate(np.array([[-1.0]]), [{0}])
    assert {name: values.tolist() for name, values in per_query.items()} == {name: [1.0] for name in metrics.METRICS}


def test_infinities_rank_and_order_of_documents_does_not_matter():
    scores = np.array([[-np.inf, 0.0, np.inf, -np.inf]])
    assert [ranks.tolist() for ranks, _ in metrics.gold_of(scores, [{2, 3}])] == [[0, 3]]
    assert [ranks.tolist() for ranks, _ in metrics.gold_of(scores[:, ::-1], [{1, 0}])] == [[0, 3]]


@settings(deadline=None)
@given(rankings(6, 3))
def test_sets_and_matrix_are_the_same(ranking):
    scores, relevant = ranking
    by_set = metrics.evaluate(scores, [set(np.flatnonzero(row)) for row in relevant])
    for name, values in metrics.evaluate(scores, relevant).items():
        np.testing.assert_array_equal(values, by_set[name])


@pytest.mark.parametrize(
    "scores, relevance, message",
    [
        (np.array([[0.0, np.nan]]), [{0}], "query 0 hold NaN"),
        (np.zeros((2, 3)), [{0}, set()], "query 1 has no relevant document"),
        (np.zeros((2, 0)), [set(), set()], "query 0 has no relevant document"),
        (np.zeros((0, 3)), [], "at least one query"),
        (np.zeros(3), [{0}], "at least one query"),
        (np.zeros((2, 3)), [{0}], "1 sets for 2 queries"),
        (np.zeros((1, 3)), [{3}], "names document 3"),
        (np.zeros((1, 3)), [{-1}], "names document -1"),
        (np.zeros((1, 3)), np.ones((3, 1), bool), r"bool \(3, 1\): expected bool"),
        (np.zeros((1, 3)), np.ones((1, 3)), "float64"),
        (np.zeros((1, 3)), np.array([[1, 0, -1]]), "grades from 0"),
    ],
)
def test_refuses(scores, relevance, message):
    with pytest.raises(UserError, match=message) as caught:
        metrics.evaluate(scores, relevance)
    assert "\n" not in str(caught.value)


def test_bootstrap_is_percentiles_of_resampled_means():
    values = np.random.default_rng(0).random((2, 3, 40))
    mean, low, high = metrics.bootstrap_mean(values, seed=5, samples=300)
    draws = np.random.default_rng(5).integers(40, size=(300, 40))
    resampled = values[..., draws].mean(axis=-1)
    np.testing.assert_allclose(mean, values.mean(axis=-1))
    np.testing.assert_allclose([low, high], np.percentile(resampled, (2.5, 97.5), axis=-1))


def test_bootstrap_in_blocks_agrees_with_the_normal_interval():
    values = (np.random.default_rng(1).random(3000) < 0.4).astype(float)  # 10,000 x 3,000 draws: several blocks
    mean, low, high = metrics.bootstrap_mean(values, seed=0)
    half = 1.96 * values.std() / np.sqrt(3000)
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.05)
