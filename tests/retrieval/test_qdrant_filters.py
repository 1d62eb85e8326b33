"""Filters of a search in Qdrant: its client's engine and the engine in this process, against their definition in Python."""

from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaembed_jax.errors import UserError
from metaembed_jax.retrieval.qdrant import QdrantIndex
from tests.retrieval.filter_reference import filters_of, matches
from tests.retrieval.test_qdrant import DOCUMENTS, QUERIES, WIDTH, names

ITEMS = 60
NUMBERS = [0, 1, 1.0, 2, 2.5, -3, 2**53 - 1, 2.0**50, 1e-3]  # the engine stores 2.0**53 - 1 as 2.0**53 - 2
scalars = st.sampled_from([*NUMBERS, "", "a", "ab", "é", "1", True, False])
filters = filters_of(scalars, st.sampled_from(NUMBERS))


@pytest.fixture(scope="module", params=["client", "edge"])
def index(request, tmp_path_factory):
    location = ":memory:" if request.param == "client" else f"edge:{tmp_path_factory.mktemp('edge')}"
    rng = np.random.default_rng(0)
    values = [None, *NUMBERS, "", "a", "ab", "é", "1", True, False]
    fields = [{key: values[rng.integers(len(values))] for key in ("a", "b.c", "ключ") if rng.random() < 0.8} for _ in range(ITEMS)]
    with closing(QdrantIndex.create(location, "icons", WIDTH, 4)) as index:
        index.add(names(ITEMS), DOCUMENTS[:ITEMS, :4], fields)
        index.fields = fields
        yield index


@settings(max_examples=200, deadline=None, derandomize=True)
@given(where=filters)
def test_equal_to_the_definition(index, where):
    hits = index.search(QUERIES[:1], ITEMS, (1, 1), where=where)
    expected = {f"item {n}" for n, fields in enumerate(index.fields) if matches(where, fields)}
    assert {*hits.ids[0]} == expected and hits.ids.shape == (1, len(expected))


def test_the_filter_is_of_the_first_stage(index):
    where = {"a": {"$in": ["a", "ab", 1]}}
    rows = [n for n, fields in enumerate(index.fields) if matches(where, fields)]
    hits = index.search(QUERIES, 3, [(1, 1, 4), (16, 4)], where=where)
    assert len(rows) > 4 and {*hits.ids.flat} <= {f"item {n}" for n in rows}
    first = QUERIES[:, 0] @ DOCUMENTS[rows, 0].T
    for ids, scores in zip(hits.ids, first, strict=True):
        assert {*ids} <= {f"item {rows[n]}" for n in np.argsort(-scores)[:4]}


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"a": {"$gt": "a"}}, "'a': $gt: 'a': expected a number, because Qdrant has no order of texts"),
        ({"a": 2**53}, "'a': 9007199254740992: expected less than 2**53"),
        ({"a": {"$lt": float("inf")}}, "'a': inf: expected less than 2**53"),
        ({'"': 1}, "expected a key for Qdrant: not empty, without quotation marks"),
        ({"a": {"$like": 1}}, "unknown operator '$like'"),
    ],
)
def test_what_it_cannot_compare_is_refused(index, where, message):
    with pytest.raises(UserError) as error:
        index.search(QUERIES, where=where)
    assert message in str(error.value)
