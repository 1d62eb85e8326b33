"""Certified searches against exact arithmetic, on items that float32 and int8 cannot tell apart."""

from fractions import Fraction

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import metaembed_jax as me
from metaembed_jax.mesh import make_mesh
from metaembed_jax.retrieval import certified, exact_vectors, segment
from metaembed_jax.retrieval.ingest import to_int8
from tests.retrieval.reference import exact, unit

ONE = make_mesh(devices=jax.devices()[:1])


def near(rng, items, vectors, width):
    """Return unit vectors of which many are equal, or differ in the last bits."""
    bases = unit(rng, 1 + items // 8, vectors, width)
    chosen = bases[rng.integers(len(bases), size=items)]
    ulps = rng.integers(-1, 2, chosen.shape) * (rng.random(items) < 0.6)[:, None, None] * np.spacing(chosen)
    return (chosen + ulps).astype(np.float32)


def best(query_RD, items, k, budget):
    """Return the rows of the k best items by their definition in fractions."""
    r_q, r_c = budget

    def fractions(vectors):
        return [[Fraction(float(number)) for number in vector] for vector in vectors]

    query = fractions(query_RD[:r_q])

    def score(vectors):
        products = [[sum(x * y for x, y in zip(q, d, strict=True)) for d in fractions(vectors[:r_c])] for q in query]
        return sum(map(max, products))

    scores = {n: score(vectors) for n, vectors in items.items()}
    rows = sorted(items, key=lambda n: (-scores[n], n))[:k]
    return rows, np.array([float(scores[n]) for n in rows], np.float32)


@settings(max_examples=18, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 7, 40]),
    st.sampled_from([unit, exact, near]),
    st.sampled_from([("int8", "float32"), ("int8", "bfloat16"), ("float32", None)]),
    st.booleans(),
    st.booleans(),
)
def test_equal_to_exact_arithmetic(seed, count, make, types, is_ragged, is_changed):
    rng, (dtype, kind), vectors = np.random.default_rng(seed), types, 3
    query, document = unit(rng, 2, 2, 4), make(rng, count, vectors, 4)
    items = {n: item[: rng.integers(1, vectors + 1)] if is_ragged else item for n, item in enumerate(document)}
    first = max(count // 2, 1)
    index = me.Index.build([*items.values()][:first], map(str, range(first)), dtype=dtype, exact=kind, mesh=ONE, budget=vectors)
    if first < count:
        index.add([*items.values()][first:], map(str, range(first, count)))
    if is_changed:
        for deleted in rng.choice(count, count // 4, replace=False).tolist():
            index.delete([str(deleted)])
            del items[deleted]
    budget, k = [(1, 1), (2, 2), (2, 3)][rng.integers(3)], min([1, 5, len(items)][rng.integers(3)], len(items))
    hits = index.search(query, k, budget, certified=True)
    assert hits.certified.all() and not hits.uncertified_reason and (hits.rescored >= k).all()
    stored = {n: item.astype(ml_dtypes.bfloat16) if kind == "bfloat16" else item for n, item in items.items()}
    for number, query_RD in enumerate(query):
        rows, scores = best(query_RD, stored, k, budget)
        assert hits.ids[number].tolist() == [str(row) for row in rows]
        np.testing.assert_array_equal(hits.scores[number], scores)


def depths(monkeypatch, first, factor, last):
    for name, value in {"FIRST_DEPTH": first, "DEPTH_FACTOR": factor, "LAST_DEPTH": last, "SEARCH_RESULTS": 16}.items():
        monkeypatch.setattr(certified, name, value)
    monkeypatch.setattr(exact_vectors, "READ_NUMBERS", 64)
    monkeypatch.setattr(segment, "READ_ITEMS", 7)


def test_few_items_are_scored_again_and_the_search_grows_until_it_is_sure(monkeypatch):
    depths(monkeypatch, 4, 2, 4096)
    rng = np.random.default_rng(1)
    query, document = unit(rng, 9, 4, 16), unit(rng, 500, 9, 16)
    index = me.Index.build(document, dtype="int8", exact="float32", mesh=ONE)
    hits = index.search(query, 5, (4, 9), certified=True)
    scores = (query.astype(float)[:, None] @ document.astype(float).swapaxes(1, 2)).max(3).sum(2)
    order = np.argsort(-scores, axis=1)[:, :5]
    assert hits.certified.all() and hits.ids.tolist() == order.astype(str).tolist()
    np.testing.assert_allclose(hits.scores, np.take_along_axis(scores, order, axis=1), rtol=1e-7)
    assert (hits.rescored >= 5).all() and hits.rescored.mean() < 50


def test_a_query_with_too_many_equal_items_is_not_certified(monkeypatch):
    depths(monkeypatch, 4, 2, 8)
    rng = np.random.default_rng(2)
    document = unit(rng, 60, 2, 8)
    document[20:] = document[20]
    query = document[[20, 3]]
    index = me.Index.build(document, dtype="int8", exact="float32", mesh=ONE)
    hits = index.search(query, 3, certified=True)
    assert hits.certified.tolist() == [False, True] and hits.uncertified_reason.startswith("more than")
    assert hits.ids[0].tolist() == ["20", "21", "22"] and hits.ids[1, 0] == "3" and hits.rescored[0] == 8
    assert index.search(query, 3).certified is None and index.search(query, 3).rescored is None
    assert index.search(query, 60, certified=True).certified.all()


def test_a_large_error_of_any_item_is_seen(monkeypatch):
    """An item far down the list of int8 may be the best, if its error is large."""
    depths(monkeypatch, 4, 2, 4096)
    rng = np.random.default_rng(3)
    query, document = unit(rng, 1, 1, 8), unit(rng, 50, 1, 8)
    document[44] = query[0]
    with monkeypatch.context() as patch:  # an int8 version that is far off
        patch.setattr(
            "metaembed_jax.retrieval.writer.to_int8", lambda x: (np.where(np.abs(x) > 0, 1, 0).astype(np.int8), x[..., 0] * 0)
        )
        index = me.Index.build(document, dtype="int8", exact="float32", mesh=ONE)
    hits = index.search(query, 3, certified=True)
    scores = (document[:, 0].astype(float) @ query[0, 0].astype(float)).ravel()
    assert hits.certified.all() and hits.ids[0].tolist() == np.argsort(-scores, kind="stable")[:3].astype(str).tolist()
    assert hits.ids[0, 0] == "44" and hits.rescored.tolist() == [50]


def test_filters_compose():
    rng = np.random.default_rng(9)
    query, document = unit(rng, 4, 2, 8), near(rng, 40, 3, 8)
    index = me.Index.build(document, metadata=[{"n": n} for n in range(40)], dtype="int8", exact="float32", mesh=ONE)
    index.delete(["7"])
    hits = index.search(query, 30, where={"n": {"$lt": 20}}, certified=True)
    items = {n: document[n] for n in range(20) if n != 7}
    for number, query_RD in enumerate(query):
        rows, scores = best(query_RD, items, 19, (2, 3))
        assert hits.ids[number].tolist() == [str(row) for row in rows]
        np.testing.assert_array_equal(hits.scores[number], scores)
    none = index.search(query, 5, where={"n": {"$gt": 99}}, certified=True)
    assert none.ids.shape == (4, 0) and none.certified.all() and not none.rescored.any()


def test_no_queries_and_one_item():
    index = me.Index.build(unit(np.random.default_rng(4), 1, 3, 8), dtype="int8", exact="bfloat16", mesh=ONE)
    hits = index.search(np.zeros((0, 2, 8), np.float32), 1, certified=True)
    assert hits.scores.shape == (0, 1) and hits.certified.shape == hits.rescored.shape == (0,)
    assert index.search(unit(np.random.default_rng(5), 3, 2, 8), certified=True).ids.tolist() == [["0"]] * 3


def test_what_cannot_be_certified_is_refused():
    document = unit(np.random.default_rng(6), 5, 3, 8)
    index = me.Index.build(document, dtype="int8", mesh=ONE)
    with pytest.raises(me.UserError, match="has no exact vectors; index again with dtype='int8' and exact='float32' or 'bfloat16'"):
        index.search(document, 2, certified=True)
    index = me.Index.build(document, dtype="int8", exact="float32", mesh=ONE)
    with pytest.raises(me.UserError, match=r"certified=True with the budget 1:1:4>2:2: expected one budget"):
        index.search(document, 2, [(1, 1, 4), (2, 2)], certified=True)
    with pytest.raises(me.UserError, match=r"certified=True with the budget 2:2x4: expected one without a width"):
        index.search(document, 2, (2, 2, 4), certified=True)
    assert index.search(document, 2, (2, 2, 8), certified=True).certified.all()


@pytest.mark.parametrize("name", ["exact-0-1", "exact-1-3", "errors-0-1"])
def test_only_a_certified_search_reads_the_exact_vectors(name):
    document = unit(np.random.default_rng(7), 5, 3, 8)
    index = me.Index.build(document, dtype="int8", exact="float32", mesh=ONE)
    file = next(index.folder.glob(f"*/{name}"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    index = me.Index.load(index.folder, mesh=ONE)
    index.search(document, 2)
    with pytest.raises(me.UserError, match=f"{name} is damaged"):
        index.search(document, 2, certified=True)
    with pytest.raises(me.UserError, match=f"{name} is damaged"):
        index.verify()


def test_the_same_on_eight_devices_and_in_their_memory():
    rng = np.random.default_rng(8)
    query, document = unit(rng, 5, 4, 16), near(rng, 333, 9, 16)
    index = me.Index.build(document, dtype="int8", exact="float32", mesh=ONE)
    alone = index.search(query, 20, certified=True)
    for resident in (False, True):
        together = me.Index.load(index.folder, mesh=make_mesh(2, 2, 2), resident=resident).search(query, 20, certified=True)
        for name in ("scores", "ids", "certified"):
            np.testing.assert_array_equal(getattr(alone, name), getattr(together, name))


@pytest.mark.parametrize("width", [8, 1024])
def test_scores_are_within_their_bounds(width):
    rng = np.random.default_rng(width)
    query, document = unit(rng, 3, 4, width), unit(rng, 60, 3, width)
    index = me.Index.build(document, dtype="int8", exact="float32", mesh=ONE)
    files = exact_vectors.ExactVectors(index._segments, index._manifest.levels, width)
    scores_QN, ids_QN = index.search(query, 60)
    (numbers, scales), errors_N = to_int8(document), files.errors(3).astype(float)
    stored = numbers * scales.astype(float)[..., None]
    for query_RD, scores_N, ids_N in zip(query, scores_QN, ids_QN, strict=True):
        bounds, rows = certified._Query(files, query_RD, 3, errors_N.max()), ids_N.astype(int)
        by_int8, by_exact = (
            (query_RD.astype(float) @ x[rows].swapaxes(1, 2)).max(2).sum(1) for x in (stored, document.astype(float))
        )
        assert (np.abs(scores_N - by_int8) <= bounds._rounding32).all()
        assert (np.abs(by_exact - by_int8) <= bounds._length * errors_N[rows]).all()
        assert bounds._rounding32 < 0.1 * bounds._length * errors_N.max() and bounds._rounding64 < 1e-10
