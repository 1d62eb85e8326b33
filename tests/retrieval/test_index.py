"""Building and changing an index, and the input that it refuses."""

import functools
import inspect

import jax
import ml_dtypes
import numpy as np
import pytest

import metaembed_jax as me
from metaembed_jax.late_interaction.maxsim import maxsim
from metaembed_jax.mesh import make_mesh
from metaembed_jax.retrieval import segment, writer
from metaembed_jax.retrieval.qdrant import QdrantIndex
from metaembed_jax.retrieval.searchable import Searchable
from metaembed_jax.retrieval.segment import SegmentFiles
from tests.retrieval.reference import unit

ONE = make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def vectors():
    return unit(np.random.default_rng(0), 12, 9, 8)


@pytest.fixture
def index(vectors):
    return me.Index.build(vectors, [f"id {n}" for n in range(12)], mesh=ONE)


def test_iterators_and_lists_give_what_arrays_give(vectors, tmp_path):
    query = vectors[:3, :4]
    array = me.Index.build(vectors, mesh=ONE).search(query, 12)
    ids = [str(n) for n in range(12)]
    blocks = ((ids[n : n + 5], vectors[n : n + 5], [{"n": n}] * len(ids[n : n + 5])) for n in range(0, 12, 5))
    streamed = me.Index.build(blocks, path=tmp_path / "index", mesh=ONE)
    for other in (me.Index.build(list(vectors), mesh=ONE), streamed):
        for expected, actual in zip(array, other.search(query, 12), strict=True):
            np.testing.assert_array_equal(actual, expected)
    assert len(streamed._segments) == 1 and streamed.metadata("7") == {"n": 5}


def test_by_default_a_search_returns_ten_or_what_there_is(index, vectors):
    assert index.search(vectors[:2])[1].shape == (2, 10)
    assert index.search(vectors[:2], budget=[(1, 1, 5), (2, 2)])[1].shape == (2, 5)
    assert me.Index.build(vectors[:3], mesh=ONE).search(vectors[:2])[1].shape == (2, 3)


def test_only_the_first_vectors_are_kept(vectors):
    index = me.Index.build(vectors, budget=5, dtype="float32", mesh=ONE)
    np.testing.assert_allclose(
        index.search(vectors[:2, :3], 1)[0][:, 0], maxsim(vectors[:2, :3], vectors[:2], (3, 5)).diagonal(), rtol=1e-5
    )
    assert index.vectors == 5 and not list(index.folder.glob("*/vectors-8-9"))
    index.add(vectors[:1], ["more"])
    assert index.search(vectors[:1, :3], 2)[1].tolist() == [["0", "more"]]
    with pytest.raises(me.UserError, match=r"5 of a document.*this index stores 5 vectors an item"):
        index.search(vectors[:2, :3], 1, (3, 6))


def test_int8_is_half_of_bfloat16(vectors):
    sizes = {}
    for dtype in ("float32", "bfloat16", "int8"):
        index = me.Index.build(vectors, dtype=dtype, mesh=ONE)
        sizes[dtype] = sum(file.stat().st_size for file in index.folder.glob("*/vectors-*"))
    assert sizes["float32"] == 2 * sizes["bfloat16"] == 4 * sizes["int8"] == 4 * vectors.size


def test_a_deleted_id_may_be_added_again(index, vectors):
    index.delete(["id 3"])
    index.add(vectors[5:6], ["id 3"], metadata=[{"text": "née"}])
    assert index.metadata("id 3") == {"text": "née"} and len(index) == 12
    index.compact()
    assert index.search(vectors[5:6], 2)[1].tolist() == [["id 5", "id 3"]]  # the order of items is kept
    assert index.metadata("id 3") == {"text": "née"}


def test_everything_deleted(index, vectors):
    index.delete(f"id {n}" for n in range(12))
    for _ in range(2):
        with pytest.raises(me.UserError, match="is an empty index"):
            index.search(vectors, 1)
        index.compact()
    assert len(index) == 0
    index.add(vectors[:1], ["new"])
    assert index.search(vectors[:1], 1)[1].tolist() == [["new"]]


def test_no_queries(index):
    scores, ids = index.search(np.zeros((0, 2, 8), np.float32), 3)
    assert scores.shape == ids.shape == (0, 3)


def test_hits_carry_metadata_of_the_index_that_was_searched(vectors, monkeypatch):
    index = me.Index.build(vectors, [f"id {n}" for n in range(12)], metadata=[{"n": n} for n in range(12)], mesh=ONE)
    index.add(vectors[:3] * -1, ["id 12", "id 13", "id 14"], metadata=[{"n": 12}, None, {"n": 14}])
    monkeypatch.setattr(SegmentFiles, "find", None)  # no id is looked up
    hits = index.search(vectors[:2, :3], 15)
    expected = [[{"n": int(item[3:])} if item != "id 13" else {} for item in row] for row in hits.ids]
    index.compact()
    assert [hits.metadata(0), hits.metadata(1)] == expected
    assert hits[0] is hits.scores and hits[1] is hits.ids
    with pytest.raises(me.UserError, match="query=2: expected the number of one of the 2 queries"):
        hits.metadata(2)


@pytest.mark.parametrize("kind", [me.Index, QdrantIndex])
def test_kinds_of_indexes_have_one_interface(kind):
    for name in ("search", "check_model", "__len__"):
        parameters, own = (inspect.signature(getattr(cls, name)).parameters for cls in (Searchable, kind))
        assert [(own[key].name, own[key].kind) for key in parameters] == [(key, value.kind) for key, value in parameters.items()]
        assert all(own[key].default is not inspect.Parameter.empty for key in own if key not in parameters)
    assert isinstance(kind.vectors, property)


def test_ids_with_the_same_hash(vectors, monkeypatch):
    for module in (writer, segment):
        monkeypatch.setattr(module, "hashes", lambda ids: np.array([len(item) for item in ids], np.uint64))
    index = me.Index.build(vectors, [f"{n:02}" for n in range(12)], metadata=[{"n": n} for n in range(12)], mesh=ONE)
    assert [index.metadata(f"{n:02}")["n"] for n in range(12)] == list(range(12))
    index.delete(["03", "11"])
    assert len(index) == 10 and index.metadata("04") == {"n": 4}
    with pytest.raises(me.UserError, match="has no item '03'"):
        index.metadata("03")


def test_bfloat16_vectors_are_of_length_one(vectors):
    rounded = vectors.astype(ml_dtypes.bfloat16)
    me.Index.build(rounded, mesh=ONE).search(rounded[:1], 1)


NAN = np.full((1, 1, 8), np.nan)
EYE = np.eye(8, dtype=np.float32)[None]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.zeros((0, 4, 8)),), "nothing to index"),
        (([],), "nothing to index"),
        ((iter([]),), "nothing to index"),
        ((3,), "vectors: expected an array, a list or an iterator, not a int"),
        ((EYE[0],), "expected .items, vectors, width"),
        ((EYE, ["a", "b"]), "ids: 2 for 1 items"),
        ((EYE, [3]), "id 3 of item 0: expected a text"),
        ((EYE, [""]), "expected a text that is not empty"),
        ((EYE, ["\ud800"]), "expected a text"),
        ((np.repeat(EYE, 2, 0), ["a", "a"]), "the id 'a' is given twice"),
        ((iter([(["b", "a"], np.repeat(EYE, 2, 0)), (["a"], EYE)]),), "the id 'a' is given twice"),
        ((2 * EYE, ["a"]), "vector 0 of item 'a' has length 2, not 1"),
        (
            (np.concatenate([EYE, 0 * EYE]), ["a", "b"]),
            "vector 0 of item 'b' has length 0, not 1: it is zero and has no direction; leave it out",
        ),
        ((NAN, ["a"]), "item 'a' has length nan.*NaN or infinities"),
        (([EYE[0], EYE[0, :, :7]], ["a", "b"]), r"item 'b' have the shape \(8, 7\)"),
        (([EYE[0], EYE[0, :0]], ["a", "b"]), r"item 'b' have the shape \(0, 8\)"),
        ((iter([(["a"], EYE), (["b"], np.eye(7)[None])]),), "item 'b' have width 7; expected 8"),
        ((iter([(["a"], EYE[:, :2]), (["b"], EYE)]),), "item 'b' has 8 vectors; expected at most 2; set budget="),
        ((iter([(["a"],)]),), "block 0 is not a tuple"),
        ((iter([(["a"], EYE)]), ["a"]), "expected them in its blocks"),
        ((iter([(5, EYE)]),), "ids: expected a list, not a int"),
        ((iter([(["a"], 5)]),), "vectors: expected an array of real numbers, not a int"),
        ((iter([(["a"], EYE, 5)]),), "metadata: expected a list, not a int"),
        ((EYE, "a"), "ids: expected a list, not a str"),
        (({"a": EYE[0]},), "vectors: expected an array, a list or an iterator, not a dict"),
        ((EYE.astype(str),), "vectors: expected an array of real numbers"),
        ((EYE * 1j,), "vectors: expected an array of real numbers, not a ndarray of complex64"),
        (([EYE[0], "text"], ["a", "b"]), "the vectors of item 'b': expected an array of real numbers"),
        (([[[1.0], [0.6, 0.8]]], ["a"]), "the vectors of item 'a': expected an array of numbers"),
    ],
)
def test_bad_items_are_refused(arguments, message, tmp_path):
    with pytest.raises(me.UserError, match=message):
        me.Index.build(*arguments, path=tmp_path / "index", mesh=ONE)
    with pytest.raises(me.UserError, match="is not an index"):
        me.Index.load(tmp_path / "index")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "float16"}, "dtype='float16': expected bfloat16, float32, int8"),
        ({"dtype": ["int8"]}, "expected bfloat16, float32, int8"),
        ({"budget": 0}, "budget=0"),
        ({"metadata": [{"a": np.nan}]}, "metadata of item 'a' cannot be written as JSON"),
        ({"metadata": [{"a": object()}]}, "metadata of item 'a' cannot be written as JSON"),
        ({"metadata": ["text"]}, "expected a dict, not a str"),
        ({"metadata": []}, "metadata: 0 for 1 items"),
        ({"metadata": {"a": 1}}, "metadata: expected a list, not a dict"),
        ({"metadata": [functools.reduce(lambda deep, _: {"a": deep}, range(9999), {})]}, "of item 'a' cannot be written as JSON"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(me.UserError, match=message):
        me.Index.build(EYE, ["a"], mesh=ONE, **options)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "query, k, budget, message",
    [
        (np.eye(7)[None], 1, None, r"shape \(1, 7, 7\).*\[queries, vectors, 8\]"),
        (EYE[0], 1, None, "have the shape"),
        ([[[1.0] * 8], []], 1, None, "queries: expected an array of numbers"),
        (EYE.astype(complex), 1, None, "queries: expected an array of real numbers, not a ndarray of complex128"),
        (EYE, 1, 5, "budget 5: expected a pair.*stores 9 vectors an item"),
        (2 * EYE, 1, None, "vector 0 of query 0 has length 2, not 1"),
        (np.concatenate([EYE, np.full((1, 8, 8), np.inf)]), 1, None, "query 1 .* NaN or infinities"),
        (EYE, 13, None, "k=13: expected 1 to 12, the number of items"),
        (EYE, 0, None, "k=0"),
        (EYE, 1.0, None, "k=1.0"),
        (EYE, 6, [(1, 1, 5), (2, 2)], "k=6: expected 1 to 5, the survivors of a stage"),
        (EYE, 1, (9, 9), "9 of a document .*stores 9 vectors an item"),
        (EYE, 1, (8, 10), "stores 9 vectors an item"),
        (EYE, 1, (1,), "positive integers"),
        (EYE, 1, [(1, 1), (2, 2)], "survivors"),
    ],
)
def test_bad_searches_are_refused(index, query, k, budget, message):
    with pytest.raises(me.UserError, match=message):
        index.search(query, k, budget)


def test_bad_changes_are_refused(index, vectors):
    with pytest.raises(me.UserError, match="has no item 'id 99'; nothing was deleted"):
        index.delete(["id 1", "id 99"])
    with pytest.raises(me.UserError, match="already has an item 'id 2'"):
        index.add(vectors[:2], ["new", "id 2"])
    with pytest.raises(me.UserError, match="the id 'new' is given twice"):
        index.add(vectors[:2], ["new", "new"])
    with pytest.raises(me.UserError, match="width 7; expected 8"):
        index.add(np.eye(7)[None], ["new"])
    with pytest.raises(me.UserError, match="has no item 'new'"):
        index.metadata("new")
    for wrong in ([5], ["\ud800"], 5, None):
        with pytest.raises(me.UserError, match="expected a (text|list)"):
            index.delete(wrong)
    with pytest.raises(me.UserError, match="id 5 of item 0: expected a text"):
        index.metadata(5)
    assert len(index) == 12
