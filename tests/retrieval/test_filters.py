"""Filters of a search by metadata, against their definition in Python."""

import functools
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import metaembed_jax as me
from metaembed_jax.mesh import make_mesh
from metaembed_jax.retrieval import columns
from metaembed_jax.retrieval.matching import match_items
from tests.retrieval import reference
from tests.retrieval.filter_reference import filters_of, is_refused, matches, metadata_of
from tests.retrieval.reference import unit

ONE = make_mesh(devices=jax.devices()[:1])
# Values close to each other, and at the ends of what 64 bits and floats can hold.
NUMBERS = [0, 1, 1.0, -0.0, 2, 2.5, -3, 2**53, 2**53 + 1, float(2**53), 2**63 - 1, 2**63, float(2**63), -(2**63), -(2**63) - 1]
NUMBERS += [2**64, 10**400, -(10**400), 1e300, 5e-324, 2**1024 - 1]
ordered = st.sampled_from([*NUMBERS, "", "a", "ab", "é", "\ud800", "\uffff", "\U0001f600"])
scalars = ordered | st.booleans()
filters, metadata = filters_of(scalars, ordered), metadata_of(scalars | st.lists(st.integers(0, 1), max_size=1) | st.just({"a": 1}))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(metadata, min_size=1, max_size=12), st.lists(filters, min_size=12, max_size=12), st.randoms(use_true_random=False))
def test_equal_to_the_definition(stored, wheres, random):
    stored += [{"a": random.choice(NUMBERS), "b.c": "text", "ключ": True}]
    rng, cut = np.random.default_rng(random.randrange(100)), random.randrange(1, len(stored) + 1)
    vectors, ids = unit(rng, len(stored), 2, 4), [str(n) for n in range(len(stored))]
    index = me.Index.build(vectors[:cut], ids[:cut], metadata=stored[:cut], dtype="float32", mesh=ONE)
    if cut < len(stored):
        index.add(vectors[cut:], ids[cut:], metadata=stored[cut:])
    deleted = [item for item in ids if random.random() < 0.3][: len(ids) - 1]
    index.delete(deleted)
    alive = [n for n in range(len(stored)) if str(n) not in deleted]
    for kept in (range(len(stored)), alive):
        for where in wheres:
            if is_refused(where, [stored[n] or {} for n in kept]):
                with pytest.raises(me.UserError, match="where: "):
                    match_items(index._segments, where)
                continue
            mask = match_items(index._segments, where)
            assert [kept[n] for n in np.flatnonzero(mask)] == [n for n in alive if matches(where, stored[n] or {})]
        index.compact()


def test_searches_among_the_items_that_match():
    rng = np.random.default_rng(0)
    query, document = unit(rng, 5, 3, 16), unit(rng, 60, 9, 16)
    fields = [{"page": n % 7, "lang": "de" if n % 2 else "en"} for n in range(60)]
    index = me.Index.build(document[:40], dtype="float32", metadata=fields[:40], mesh=ONE)
    index.add(document[40:], map(str, range(40, 60)), metadata=fields[40:])
    index.delete(["9", "51"])
    where = {"lang": "de", "page": {"$gte": 2, "$lt": 5}}
    rest = [n for n in range(60) if n % 2 and 2 <= n % 7 < 5 and n not in (9, 51)]
    for other in (index, me.Index.load(index.folder, mesh=make_mesh(2, 2, 2), resident=True)):
        for stages in ([(3, 9)], [(1, 1, 6), (3, 9)]):
            hits = other.search(query, 5, stages, where=where)
            scores, rows = reference.search(query, document[rest], 5, stages)
            assert hits.ids.tolist() == np.array(rest)[rows].astype(str).tolist()
            np.testing.assert_allclose(hits.scores, scores, rtol=1e-5)
            assert all(found["lang"] == "de" and 2 <= found["page"] < 5 for found in hits.metadata(3))
    assert index.search(query, 100, where=where).ids.shape == (5, len(rest))
    assert index.search(query, where={"page": 3}).ids.shape == (5, 9)
    assert [x.shape for x in index.search(query, where={"page": {"$gt": 9}})] == [(5, 0), (5, 0)]
    assert index.search(query, where={"page": {"$gt": 9}}).metadata(4) == []
    for scores, filtered in zip(index.search(query, 58), index.search(query, 58, where={}), strict=True):
        np.testing.assert_array_equal(scores, filtered)


@pytest.fixture(scope="module")
def index():
    fields = [{"page": 1, "path": "a.png", "text": "x", "tags": ["a"], "new": True}, {"page": "iii", "empty": None}]
    return me.Index.build(np.ones((2, 1, 1), np.float32), metadata=fields, mesh=ONE)


DEEP_LIST = functools.reduce(lambda inner, _: [inner], range(10**5), [])
DEEP = functools.reduce(lambda inner, _: {"$not": inner}, range(10**4), {})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("where", "message"),
    [
        (5, "where=5: expected a dict, such as"),
        ({5: 1}, "the key 5: expected a text"),
        ({"$gt": 5}, "unknown operator '$gt'; allowed here: $and, $or, $not, or a key of the metadata"),
        ({"page": {"$gt": 1, "$like": 2}}, "where: 'page': unknown operator '$like'; allowed: $eq, $ne, $gt"),
        ({"page": {}}, "'page': expected a value or operators"),
        ({"page": {"$gt": True}}, "'page': $gt: True: expected a number or a text"),
        ({"page": {"$gt": [1]}}, "'page': $gt: [1]: expected a text, a number"),
        ({"page": None}, "'page': $eq: None: expected a text, a number"),
        ({"page": float("nan")}, "$eq: nan: expected"),
        ({"page": {"$in": "ab"}}, "'page': $in: 'ab': expected a list of values"),
        ({"page": {"$in": [1, None]}}, "$in: [1, None]: expected a text, a number"),
        ({"$and": []}, "$and: []: expected a list of filters"),
        ({"$or": {"page": 1}}, "$or: {'page': 1}: expected a list"),
        ({"$not": [1]}, "where=[1]: expected a dict"),
        ({"pgae": 1}, "no item has the key 'pgae'; known keys: 'new', 'page', 'path', 'text'"),
        ({"$or": [{"page": 1}, {"empty": 1}]}, "no item has the key 'empty'"),
        ({"tags": "a"}, "'tags' holds lists or objects"),
        ({"path": 3}, "'path' holds texts, and no numbers to compare"),
        ({"page": {"$ne": True}}, "'page' holds numbers and texts, and no true or false to compare"),
        ({"new": {"$in": [1, "a"]}}, "'new' holds true or false, and no numbers and texts to compare"),
        (DEEP, "at most 50 groups inside each other"),
        ({"page": DEEP_LIST}, "not lists inside lists"),
    ],
)
def test_wrong_filters_are_refused(index, where, message):
    with pytest.raises(me.UserError, match=re.escape(message)):
        index.search(np.ones((1, 1, 1), np.float32), where=where)


def test_results_of_a_filtered_search(index):
    query = np.ones((1, 1, 1), np.float32)
    with pytest.raises(me.UserError, match="k=0: expected a positive integer"):
        index.search(query, 0, where={"page": 1})
    with pytest.raises(me.UserError, match="k=3: expected 1 to 2, the survivors of a stage"):
        index.search(query, 3, [(1, 1, 2), (1, 1)], where={"page": 1})
    with pytest.raises(me.UserError, match="k=3: expected 1 to 2, the number of items"):
        index.search(query, 3)
    numbers = {"$in": (np.int8(1), np.float32(1), np.str_("x"))}
    assert index.search(query, 3, where={"page": numbers}).ids.tolist() == [["0"]]


def test_an_index_without_metadata():
    index = me.Index.build(np.ones((2, 1, 1), np.float32), mesh=ONE)
    with pytest.raises(me.UserError, match="no item has the key 'page'; no item has metadata to compare"):
        index.search(np.ones((1, 1, 1), np.float32), where={"page": 1})


def test_more_keys_than_columns(monkeypatch):
    monkeypatch.setattr(columns, "MOST_KEYS", 3)
    fields = [{"a": 1}, {"b": 2, "c": [1]}, {"d": 3, "a": 4}]
    index = me.Index.build(np.ones((3, 1, 1), np.float32), metadata=fields, mesh=ONE)
    assert match_items(index._segments, {"a": {"$gt": 1}}).tolist() == [False, False, True]
    with pytest.raises(me.UserError, match="'d' is not among the first 3 keys of the metadata in .*; index again with fewer keys"):
        match_items(index._segments, {"d": 3})
    with pytest.raises(me.UserError, match="'c' holds lists"):
        match_items(index._segments, {"c": 3})


def test_blocks_of_metadata(monkeypatch):
    monkeypatch.setattr(columns, "BLOCK_CHARACTERS", 100)
    blocks = [([f"{n}"], np.ones((1, 1, 1), np.float32), [{"n": n, "text": "é" * (n % 40)}]) for n in range(50)]
    index = me.Index.build(iter(blocks), mesh=ONE)
    assert len(index._segments[0].columns._content[0]["n"]) > 10
    for _ in range(2):
        mask = match_items(index._segments, {"n": {"$gte": 20}, "text": {"$lt": "é" * 5}})
        assert np.flatnonzero(mask).tolist() == [n for n in range(20, 50) if n % 40 < 5]
        index.compact()
