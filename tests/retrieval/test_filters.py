"""Filters of a search by metadata, against their definition in Python."""

import functools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import metaembed_jax as me
from metaembed_jax.mesh import make_mesh
from metaembed_jax.retrieval import columns, search
from metaembed_jax.retrieval.checksummed_files import ChecksummedFile, ChecksummedWriter
from metaembed_jax.retrieval.filters import OPERATORS, ORDERS, SETS
from metaembed_jax.retrieval.ingest import to_int8
from metaembed_jax.retrieval.matching import match_items
from metaembed_jax.retrieval.tile_reader import TileReader
from tests.retrieval import reference
from tests.retrieval.filter_reference import filters_of, is_refused, matches, metadata_of
from tests.retrieval.reference import unit

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "search.md"
ONE = make_mesh(devices=jax.devices()[:1])
# Values close to each other, and at the ends of what 64 bits and floats can hold.
NUMBERS = [0, 1, 1.0, -0.0, 2, 2.5, -2.5, -3, 1e300, 5e-324, 2**1024 - 1, 2**64, 10**400, -(10**400)]
NUMBERS += [2**53, 2**53 + 1, 2**53 + 2, float(2**53), 2**53 + 2.0, 2**60 + 1, float(2**60)]
NUMBERS += [2**63 - 1, 2**63, float(2**63), -(2**63), -float(2**63), -(2**63) - 1]
TEXTS = ["", "a", "ab", "é", "\ud800", "\uffff", "\U0001f600"]
ordered = st.sampled_from([*NUMBERS, *TEXTS])
scalars = ordered | st.booleans()
filters, metadata = filters_of(scalars, ordered), metadata_of(scalars | st.lists(st.integers(0, 1), max_size=1) | st.just({"a": 1}))


def test_all_pairs_of_values():
    values = [*NUMBERS, *TEXTS, True, False]
    fields = [{"a": value} for value in values] + [{}, {"a": None}, {"a": [1]}, {"a": {"b": 1}}]
    index = me.Index.build(np.ones((len(fields), 1, 1), np.float32), metadata=fields, mesh=ONE)
    operands = [*values, float("inf"), -float("inf")]
    for operator in OPERATORS:
        for operand in operands:
            if operator in ORDERS and isinstance(operand, bool):
                continue
            where = {"a": {operator: [operand, "none", 7] if operator in SETS else operand}}
            expected = [matches(where, item) for item in fields]
            assert match_items(index._segments, where).tolist() == expected, where


@settings(max_examples=8, deadline=None, derandomize=True)
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
    hits = index.search(query, 5, where=where)
    scores, rows = reference.search(query, document[rest], 5, [(3, 9)])
    assert hits.ids.tolist() == np.array(rest)[rows].astype(str).tolist()
    np.testing.assert_allclose(hits.scores, scores, rtol=1e-5)
    assert all(metadata["lang"] == "de" and 2 <= metadata["page"] < 5 for metadata in hits.metadata(3))
    assert index.search(query, 100, where=where).ids.shape == (5, len(rest))
    assert index.search(query, where={"page": 3}).ids.shape == (5, 9)
    assert [x.shape for x in index.search(query, where={"page": {"$gt": 9}})] == [(5, 0), (5, 0)]
    assert index.search(query, where={"page": {"$gt": 9}}).metadata(4) == []
    for scores, filtered in zip(index.search(query, 58), index.search(query, 58, where={}), strict=True):
        np.testing.assert_array_equal(scores, filtered)


def as_stored(document, dtype):
    """Return the vectors that an index of a type stores, float64."""
    if dtype == "int8":
        numbers, scales = to_int8(document)
        return numbers * scales.astype(float)[..., None]
    return document.astype(dtype).astype(float)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["float32", "bfloat16", "int8"]),
    st.sampled_from([1, 8]),
    *[st.booleans()] * 3,
    st.sampled_from([None, {"page": 3}, {"page": {"$lt": 6}}, {"$not": {"lang": "de", "page": {"$ne": 2}}}]),
)
def test_every_kind_of_search_equals_the_definition(seed, dtype, devices, resident, ragged, staged, where):
    rng = np.random.default_rng(seed)
    make = unit if dtype == "int8" or seed % 2 else reference.exact  # nearly all of which tie
    query, document = make(rng, 3, 3, 16), make(rng, 200, 4, 16)
    counts = rng.integers(1, 5, 200) if ragged else np.full(200, 4)
    fields = [{"page": n % 9, "lang": "de" if n % 2 else "en"} for n in range(200)]
    items = [vectors_RD[:count] for vectors_RD, count in zip(document, counts, strict=True)]
    index = me.Index.build(items[:150], dtype=dtype, budget=4, metadata=fields[:150], mesh=ONE)
    index.add(items[150:], map(str, range(150, 200)), metadata=fields[150:])
    deleted = {*rng.choice(200, rng.integers(0, 100), replace=False).tolist()}
    index.delete(map(str, deleted))
    rest = [n for n in range(200) if n not in deleted and matches(where or {}, fields[n])]
    stages = [(1, 1, 12), (2, 3, 8), (3, 4)] if staged else [(2, 4)]
    stored = [vectors_RD[:count] for vectors_RD, count in zip(as_stored(document, dtype), counts, strict=True)]
    k = min(8, len(rest))
    scores, rows = reference.search(query, [stored[n] for n in rest], k, stages)
    mesh = make_mesh(2, 2, 2) if devices == 8 else ONE
    hits = me.Index.load(index.folder, mesh=mesh, resident=resident).search(query, 8, stages, where=where)
    assert hits.ids.tolist() == [[str(rest[row]) for row in rows_k] for rows_k in rows[:, :k].tolist()]
    np.testing.assert_allclose(hits.scores, scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_few_candidates_are_read_alone_and_have_the_same_bits(dtype, monkeypatch):
    rng = np.random.default_rng(1)
    query, document = unit(rng, 3, 3, 16), unit(rng, 300, 5, 16)
    ragged = [vectors_RD[: 1 + n % 5] for n, vectors_RD in enumerate(document)]
    index = me.Index.build(ragged, dtype=dtype, metadata=[{"page": n % 9} for n in range(300)], mesh=make_mesh(2, 2, 2))
    read, counts = TileReader.read, []
    monkeypatch.setattr(TileReader, "read", lambda reader, rows, *sizes: (counts.append(len(rows)), read(reader, rows, *sizes))[1])
    results, where = [], {"page": 4}
    for sparse in (10**9, 0):
        monkeypatch.setattr(search, "SPARSE", sparse)
        hits = index.search(query, 50, (3, 5), where=where), index.search(query, 7, [(1, 1, 9), (3, 5)], where=where)
        results.append([*hits[0], *hits[1]])
    assert 300 in counts and 33 in counts
    for alone, among_all in zip(*results, strict=True):
        np.testing.assert_array_equal(alone, among_all)


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
    numbers = {"$in": (np.int8(1), np.float32(1), np.str_("x")), "$lt": np.int64(2**53 + 1)}
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


def test_a_damaged_column_is_one_error(tmp_path):
    query, fields = np.ones((1, 1, 1), np.float32), [{"page": 1}, {"page": 2}]
    me.Index.build(np.ones((2, 1, 1), np.float32), metadata=fields, path=tmp_path / "index", mesh=ONE)
    for name in ("columns", "column-index"):
        file = next(tmp_path.glob(f"index/*/{name}"))
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        index = me.Index.load(tmp_path / "index", mesh=ONE)
        assert index.search(query).ids.shape == (1, 2)  # without a filter it is not read
        with pytest.raises(me.UserError, match=f"{name} is damaged near byte 0"):
            index.search(query, where={"page": 1})
        file.write_bytes(content)


def test_columns_that_another_program_wrote(tmp_path):
    """Their checksums match."""

    def store(name, content):
        writer = ChecksummedWriter(tmp_path / name)
        writer.write(content)
        writer.close()
        return ChecksummedFile(writer.path, np.array(writer.crcs, np.uint32), len(content), np.uint8)

    content = columns._encode(columns.INT, [0, 7], [1, 2]).to_pybytes()
    values = store("columns", content + bytes(9))

    def open_columns(number, entries, items=8):
        if not isinstance(entries, bytes):
            entries = json.dumps({"columns": entries, "nested": [], "has_more": False}).encode()
        return columns.Columns(values, store(f"index {number}", entries), items)

    good = ["page", "int", 0, len(content)]
    (column,) = open_columns("good", [good]).read("page", columns.KINDS)
    assert column.rows.tolist() == [0, 7] and column.values.tolist() == [1, 2]
    wrong = [b"x", b"[]", b"{}", b"[" * 10**5, [good[:3]], [["page", "int", 0, 10**6]], [["page", "x", 0, 8]]]
    for number, entries in enumerate(wrong):
        with pytest.raises(me.UserError, match=f"index {number} is not valid; build the index again"):
            open_columns(number, entries).kinds  # noqa: B018
    for number, (entry, items) in enumerate([(good, 7), (["page", "float", *good[2:]], 8), (["page", "int", 8, good[3]], 8)]):
        broken = open_columns(f"broken {number}", [entry], items)
        with pytest.raises(me.UserError, match="columns: the column 'page' is not valid; build the index again"):
            list(broken.read("page", columns.KINDS))


def test_the_output_in_the_documentation(capsys):
    filters_section = DOCUMENTATION.read_text(encoding="utf-8").split("## Filters")[1]
    code, printed = re.search(r"```python\n(.*?)```\n+```\n(.*?)```", filters_section, re.DOTALL).groups()
    exec(code, {})
    assert capsys.readouterr().out == printed
