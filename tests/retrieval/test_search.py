"""Searches of an index against their definition in float64."""

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import metaembed_jax as me
from metaembed_jax.late_interaction import levels
from metaembed_jax.retrieval import checked
from metaembed_jax.retrieval import search as module
from metaembed_jax.retrieval.items import to_int8
from metaembed_jax.sharding import make_mesh
from tests.retrieval import reference
from tests.retrieval.reference import exact, unit

ONE = make_mesh(devices=jax.devices()[:1])


def assert_found(index, queries, items, k, budget, stages):
    scores, ids = index.search(queries, k=k, budget=budget)
    wanted_scores, wanted_rows = reference.search(queries, items, k, stages)
    assert scores.dtype == np.float32 and ids.tolist() == wanted_rows.astype(str).tolist()
    np.testing.assert_allclose(scores, wanted_scores, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**32 - 1), st.integers(0, 5), st.integers(1, 40), st.integers(1, 9), st.booleans(), st.booleans(), st.booleans()
)
def test_equal_to_the_definition(seed, queries, candidates, vectors, ties, ragged, staged):
    rng = np.random.default_rng(seed)
    make = exact if ties else unit
    query, candidate = make(rng, queries, 3, 16), make(rng, candidates, vectors, 16)
    items = [one[: rng.integers(1, vectors + 1)] for one in candidate] if ragged else candidate
    most = max(map(len, items))
    stages = [(int(rng.integers(1, 4)), int(rng.integers(1, most + 1))) for _ in range(3)]
    if staged:
        stages = [(*stages[0], candidates), (*stages[1], max(candidates // 2, 1)), stages[2]]
    k = int(rng.integers(1, min([candidates, *(stage[2] for stage in stages[:-1])] if staged else [candidates]) + 1))
    index = me.Index.build(list(items) if ragged else items, dtype="float32", mesh=ONE)
    assert_found(index, query, items, k, stages if staged else stages[0], stages if staged else stages[:1])


def test_blocks_parts_and_queries_that_do_not_divide(monkeypatch):
    for name, value in {"PART_ITEMS": 8, "BLOCK_NUMBERS": 16 * 16 * 4, "QUERY_ROWS": 32}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(levels, "QUERY_ROWS", 8)
    monkeypatch.setattr(checked, "KEPT", 0)
    monkeypatch.setattr(checked, "SCATTERED", 3)
    rng = np.random.default_rng(0)
    query, candidate = exact(rng, 21, 4, 16), exact(rng, 133, 4, 16)
    index = me.Index.build(candidate[:50], map(str, range(50)), dtype="float32", mesh=ONE)
    index.add(candidate[50:51], ["50"])
    index.add(candidate[51:], map(str, range(51, 133)))
    for stages in ([(3, 3)], [(1, 1, 40), (2, 4, 30), (4, 3)]):
        assert_found(index, query, candidate, 20, stages, stages)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_eight_devices_find_the_same_bits(dtype, monkeypatch):
    monkeypatch.setattr(module, "PART_ITEMS", 8)
    rng = np.random.default_rng(1)
    query, candidate = unit(rng, 5, 4, 16), unit(rng, 333, 9, 16)
    candidate[200] = candidate[3]
    ragged = [one[: 1 + n % 9] for n, one in enumerate(candidate)]
    for items in (candidate, ragged):
        index = me.Index.build(items, dtype=dtype, mesh=ONE)
        spread = me.Index(index.folder, make_mesh(2, 2, 2))
        for budget in ((3, 7), [(1, 1, 50), (4, 9)]):
            for alone, together in zip(index.search(query, 20, budget), spread.search(query, 20, budget), strict=True):
                np.testing.assert_array_equal(alone, together)


def test_padding_never_wins():
    far = -np.ones((1, 1, 4), np.float32) / 2  # any zero vector would score higher
    items = [far[0], np.concatenate([far[0]] * 3)]
    for dtype in ("float32", "int8"):
        scores, ids = me.Index.build(items, dtype=dtype, mesh=ONE).search(-far, k=2)
        np.testing.assert_allclose(scores, -1, rtol=1e-5)
        assert ids.tolist() == [["0", "1"]]


def test_bfloat16_and_int8_are_scored_as_they_are_stored():
    rng = np.random.default_rng(2)
    query, candidate = unit(rng, 3, 4, 32), unit(rng, 60, 9, 32)
    rounded = candidate.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert_found(me.Index.build(candidate, mesh=ONE), query, rounded, 60, (4, 9), [(4, 9)])
    numbers, scales = to_int8(candidate)
    stored = numbers * scales.astype(float)[..., None]
    assert_found(me.Index.build(candidate, dtype="int8", mesh=ONE), query, stored, 60, (3, 7), [(3, 7)])


@pytest.mark.parametrize("width", [1, 8, 100, 300])
def test_int8_is_the_nearest_of_its_kind(width):
    """Against the definition, in float64, for each vector alone."""
    candidate = unit(np.random.default_rng(7), 30, 5, width)
    candidate[2, 3] = 0
    numbers, scales = to_int8(candidate)
    assert numbers.dtype == np.int8 and scales.dtype == np.float32 and scales[2, 3] == 0 and not numbers[2, 3].any()
    stored = numbers * scales.astype(float)[..., None]
    np.testing.assert_allclose(np.sum(stored * candidate, -1), np.sum(candidate.astype(float) ** 2, -1), rtol=1e-6)
    for vector, ours in zip(candidate.reshape(-1, width).astype(float), stored.reshape(-1, width), strict=True):
        if vector.any():
            stretched = [vector / np.abs(vector).max() * largest for largest in range(127, 127 - min(max(256 // width, 1), 32), -1)]
            tried = [np.round(one) * (vector @ vector) / (np.round(one) @ vector) for one in stretched]
            error = min(np.linalg.norm(one - vector) for one in tried)
            np.testing.assert_allclose(
                np.linalg.norm(ours - vector), error, rtol=2e-2, atol=1e-7
            )  # lengths in float32 tell no more apart


def test_deleted_items_are_not_found():
    rng = np.random.default_rng(3)
    query, candidate = unit(rng, 3, 2, 8), unit(rng, 30, 5, 8)
    index = me.Index.build(candidate, dtype="float32", mesh=ONE)
    gone = ["3", "29", "0"]
    index.delete(gone)
    left = [n for n in range(30) if str(n) not in gone]
    for _ in range(2):
        for stages in ([(2, 5)], [(1, 1, 100), (2, 5)]):
            scores, ids = index.search(query, 27, stages)
            wanted, rows = reference.search(query, candidate[left], 27, [(2, 5)])
            assert ids.tolist() == np.array(left)[rows].astype(str).tolist()
            np.testing.assert_allclose(scores, wanted, rtol=1e-5)
        index.compact()
    assert len(index._segments[0]) == 27


def test_survivors_for_a_recall():
    rng = np.random.default_rng(6)
    query, candidate = unit(rng, 12, 4, 8), unit(rng, 90, 9, 8)
    index = me.Index.build(candidate, dtype="float32", mesh=ONE)
    index.delete(["5", "80"])
    best = index.search(query, 5, (4, 9))[1]
    for recall in (0.3, 0.9, 1.0):
        found = index.survivors(query, (1, 1), (4, 9), k=5, recall=recall)

        def kept(survivors):
            staged = index.search(query, 5, [(1, 1, survivors), (4, 9)])[1]
            return np.mean([name in row for wanted, row in zip(best, staged, strict=True) for name in wanted])

        assert kept(found) >= recall and (found == 5 or kept(found - 1) < recall)
    assert index.survivors(query, (1, 1), (4, 9), k=np.int8(12)) == index.survivors(query, (1, 1), (4, 9), k=12)
    for options, message in (
        ({"recall": 0}, "recall=0"),
        ({"recall": 1.1}, "recall=1.1"),
        ({"recall": "all"}, "recall='all'"),
        ({"k": 89}, "k=89"),
        ({"k": 0}, "k=0"),
    ):
        with pytest.raises(me.UserError, match=message):
            index.survivors(query, (1, 1), (4, 9), **options)
    with pytest.raises(me.UserError, match="of 0 queries"):
        index.survivors(query[:0], (1, 1), (4, 9))
    for first, last in (([(1, 1, 20), (2, 2)], (4, 9)), ((1, 1), [(1, 1, 20), (4, 9)])):
        with pytest.raises(me.UserError, match="how many survive is what is asked"):
            index.survivors(query, first, last)


def test_few_programs_are_compiled():
    rng = np.random.default_rng(4)
    index = me.Index.build(unit(rng, 100, 4, 8), mesh=ONE)
    index.search(unit(rng, 4, 2, 8), 10)
    before = levels.merge_block._cache_size()
    for queries, k in ((3, 9), (4, 16), (4, 11)):
        index.search(unit(rng, queries, 2, 8), k)
    assert levels.merge_block._cache_size() == before


def test_more_vectors_stored_than_are_searched_are_not_read():
    """A budget reads its levels alone: damage behind them is not met."""
    rng = np.random.default_rng(5)
    index = me.Index.build(unit(rng, 50, 64, 8), mesh=ONE)
    file = next(index.folder.glob("*/vectors-16-64"))
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)
    index = me.Index.load(index.folder, mesh=ONE)
    index.search(unit(rng, 2, 16, 8), 5, (16, 16))
    with pytest.raises(me.UserError, match="vectors-16-64 is damaged near byte 0"):
        index.search(unit(rng, 2, 16, 8), 5, (16, 17))
