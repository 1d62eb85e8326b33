"""Qdrant against our exact search: embedded, and what its client sends to a server."""

import json
import re
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from qdrant_client import QdrantClient
from qdrant_client.local.persistence import CollectionPersistence

import metaembed_jax as me
from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.stages import as_stages, search_in_stages
from metaembed_jax.retrieval import qdrant
from metaembed_jax.retrieval.qdrant import QdrantIndex
from tests.retrieval import fake_qdrant

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "qdrant.md"
WIDTH = 32
BUDGETS = [
    (16, 64),
    (3, 64),
    (1, 1),
    (5, 1),
    [(1, 1, 100), (16, 64)],
    [(1, 1, 500), (4, 1, 100), (4, 64, 20), (16, 64)],
]


def unit_vectors(seed, items, vectors, width=WIDTH):
    x = np.random.default_rng(seed).normal(size=(items, vectors, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def names(items):
    return [f"item {number}" for number in range(items)]


QUERIES, CANDIDATES = unit_vectors(2, 4, 16), unit_vectors(1, 2000, 64)


@pytest.fixture(scope="module")
def index():
    index = QdrantIndex.create(":memory:", "icons", WIDTH, 64, "model a")
    index.add(names(2000), CANDIDATES)
    return index


@pytest.fixture
def small():
    return QdrantIndex.create(":memory:", "small", WIDTH, 4)


def expected(candidates, budget, k):
    """Scores and names by our exact search, of which no two are so close that rounding could swap them."""

    def score(pair, rows):
        scores = np.asarray(me.maxsim(QUERIES, candidates, pair))
        return scores if rows is None else np.take_along_axis(scores, rows, axis=1)

    scores, rows = search_in_stages(score, as_stages(budget, 16, 64), k + 1)
    assert np.diff(-scores).min() > 1e-4
    scores, rows = scores[:, :k], rows[:, :k]
    return scores, np.array(names(len(candidates)), object)[rows]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_embedded_finds_what_exact_search_finds(index, budget):
    scores, ids = index.search(QUERIES, 10, budget)
    expected_scores, expected_ids = expected(CANDIDATES, budget, 10)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)


def test_without_a_budget_all_vectors_are_used(index):
    np.testing.assert_array_equal(index.search(QUERIES)[1], expected(CANDIDATES, (16, 64), 10)[1])


def test_of_fewer_items_than_asked_for_the_rest_is_none(small):
    empty_scores, empty_ids = small.search(QUERIES, 2)
    assert np.isneginf(empty_scores).all() and set(empty_ids.flat) == {None}
    small.add(["a", "b"], CANDIDATES[:2])
    scores, ids = small.search(QUERIES, 3)
    assert scores.shape == ids.shape == (4, 3)
    assert all(set(row) == {"a", "b", None} and row[2] is None for row in ids)
    assert np.isfinite(scores[:, :2]).all() and np.isneginf(scores[:, 2]).all()
    assert [x.shape for x in small.search(QUERIES[:0], 3)] == [(0, 3), (0, 3)]


def test_one_vector_an_item_is_stored_once():
    index = QdrantIndex.create(":memory:", "first", WIDTH, 1)
    index.add(names(50), CANDIDATES[:50])
    assert index.client.get_collection("first").config.params.vectors.keys() == {"first"}
    scores, ids = index.search(QUERIES, 5, (16, 1))
    expected_scores, expected_ids = expected(CANDIDATES[:50], (16, 1), 5)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)


def test_only_the_first_vectors_are_stored(small):
    small.add(names(50), CANDIDATES[:50])
    np.testing.assert_array_equal(small.search(QUERIES, 5)[1], expected(CANDIDATES[:50], (16, 4), 5)[1])


def test_what_is_known_of_items_comes_back(small):
    known = [
        {"path": "fôlder/日本語 🙂.pdf", "page": 3, "text": "Ω ≠ \x00 \u2028 <b>"},
        {"path": None, "page": None, "text": "", "tags": ("a", "b")},
        {"id": "\n"},
    ]
    small.add(["é", "e\u0301", "\n"], CANDIDATES[:3], known)
    assert len(small) == 3
    assert small.about(["e\u0301", "é", "\n"]) == [
        {"path": None, "page": None, "text": "", "tags": ["a", "b"], "id": "e\u0301"},
        known[0] | {"id": "é"},
        {"id": "\n"},
    ]


def test_what_is_added_again_is_replaced(small):
    small.add(["a", "b"], CANDIDATES[:2], [{"page": 1}, {"page": 2}])
    small.add(["b", "c"], CANDIDATES[3:5], [{"page": 4}, {"page": 5}])
    assert len(small) == 3 and [item["page"] for item in small.about(["a", "b", "c"])] == [1, 4, 5]
    scores = np.asarray(me.maxsim(QUERIES, CANDIDATES[[0, 3, 4], :4]))
    np.testing.assert_allclose(small.search(QUERIES, 3)[0], -np.sort(-scores), atol=1e-5)


def test_a_killed_upload_goes_on(tmp_path, monkeypatch):
    persist, written = CollectionPersistence.persist, []

    def killed_at_the_71st(self, point):
        if len(written) == 70:
            raise KeyboardInterrupt
        written.append(point.id)
        persist(self, point)

    ids = names(100)
    with monkeypatch.context() as patch, closing(QdrantIndex.create(tmp_path / "db", "icons", WIDTH, 64, "model a")) as index:
        patch.setattr(CollectionPersistence, "persist", killed_at_the_71st)
        with pytest.raises(KeyboardInterrupt):
            index.add(ids, CANDIDATES[:100], [{"page": n} for n in range(100)])

    with closing(QdrantIndex.create(tmp_path / "db", "icons", WIDTH, 64, "model a")) as index:
        assert len(index) == 70
        left = index.missing(ids)
        assert left == list(range(70, 100))
        index.add([ids[n] for n in left], CANDIDATES[left], [{"page": n} for n in left])

    with closing(QdrantIndex.load(tmp_path / "db", "icons")) as index:
        assert len(index) == 100 and index.missing([*ids, "new"]) == [100]
        assert [known["page"] for known in index.about(ids)] == list(range(100))
        np.testing.assert_array_equal(index.search(QUERIES, 10)[1], expected(CANDIDATES[:100], (16, 64), 10)[1])


def test_a_bar_shows_the_upload(small, capsys):
    small.add(names(70), CANDIDATES[:70], progress=True)
    assert "70/70" in capsys.readouterr().err
    small.add(names(70), CANDIDATES[:70])
    assert not capsys.readouterr().err


def test_a_server_is_asked_the_same(monkeypatch):
    monkeypatch.setattr(qdrant, "REQUEST_BYTES", 2 << 20)
    stages = [(1, 1, 100), (16, 64)]
    with fake_qdrant.serve() as (url, requests):
        index = QdrantIndex.create(url, "icons", WIDTH, 64, "model a", shard_number=6, replication_factor=2)
        index.add(names(150), CANDIDATES[:150], [{"text": "日本語"}] * 150)
        assert len(index) == 150 and index.missing(["item 7", "new"]) == [1]
        assert index.about(["item 7"]) == [{"text": "日本語", "id": "item 7"}]
        ids = QdrantIndex.load(url, "icons", "model a").search(QUERIES, 10, stages, exact=True)[1]
        np.testing.assert_array_equal(ids, expected(CANDIDATES[:150], stages, 10)[1])
    assert max(length for _, _, length in requests) < 2 << 20
    bodies = {name: [body for what, body, _ in requests if what == name] for name, _, _ in requests}
    (made,), (found,) = bodies["PUT /collections/icons"], bodies["POST /collections/icons/points/query/batch"]
    assert (made["shard_number"], made["replication_factor"]) == (6, 2)
    assert made["vectors"]["all"]["hnsw_config"] == {"m": 0} and "hnsw_config" not in made["vectors"]["first"]
    assert made["vectors"]["all"]["multivector_config"] == {"comparator": "max_sim"}
    assert {config["distance"] for config in made["vectors"].values()} == {"Dot"}
    assert [len(body["points"]) for body in bodies["PUT /collections/icons/points"]] == [41, 41, 41, 27]
    assert len(found["searches"]) == 4  # all stages of a query in one
    search = found["searches"][0]
    assert (search["using"], search["limit"], np.shape(search["query"]["nearest"])) == ("all", 10, (16, WIDTH))
    prefetch = search["prefetch"]
    assert (prefetch["using"], prefetch["limit"], np.shape(prefetch["query"])) == ("first", 100, (WIDTH,))
    assert prefetch["params"]["exact"] and "params" not in search


def test_requests_are_of_bounded_size(monkeypatch):
    items = list(qdrant._requests([10] * 130)), list(qdrant._requests([]))
    assert items == ([range(64), range(64, 128), range(128, 130)], [])
    monkeypatch.setattr(qdrant, "REQUEST_BYTES", 100)
    assert list(qdrant._requests([60, 40, 1, 100, 99, 2])) == [range(2), range(2, 3), range(3, 4), range(4, 5), range(5, 6)]


def test_a_number_as_json_is_no_longer_than_thought():
    numbers = np.frombuffer(np.random.default_rng(0).bytes(40_000), np.float32)
    unit = np.concatenate([CANDIDATES[:20].ravel(), numbers[np.abs(numbers) < 1]])
    assert max(len(json.dumps(number) + ",") for number in unit.tolist()) <= qdrant.NUMBER_BYTES


def broken(number, vector, value):
    vectors = CANDIDATES[:3, :4].copy()
    vectors[number, vector] *= value
    return vectors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "b", "a"], CANDIDATES[:3]), "'a' is there twice, at numbers 0 and 2"),
        ((["a", "", "c"], CANDIDATES[:3]), "id '' at number 1"),
        ((["a", 2, "c"], CANDIDATES[:3]), "id 2 at number 1"),
        ((["a", "b", "\ud800"], CANDIDATES[:3]), "has a character that is none"),
        (("abc", CANDIDATES[:3]), "expected a list of ids"),
        ((3, CANDIDATES[:3]), "expected a list of ids"),
        ((iter("abc"), CANDIDATES[:3]), "expected a list of ids"),
        ((["a", "b", "c"], CANDIDATES[:3] * 1j), "items: expected an array of real numbers"),
        ((["a", "b"], CANDIDATES[:3]), "2 ids, vectors of 3 items, metadata of 2"),
        ((["a", "b", "c"], CANDIDATES[:3], [{}]), "metadata of 1"),
        ((["a", "b", "c"], CANDIDATES[:3, :2]), "items have 2 vectors, and collection 'small' stores 4"),
        ((["a", "b", "c"], CANDIDATES[:3, :, :8]), "takes [items, vectors, 32]"),
        ((["a", "b", "c"], [[1.0], [2.0, 3.0], []]), "items: expected an array of numbers"),
        ((["a", "b", "c"], broken(1, 2, np.nan)), "vector 2 of number 1 of the items has length nan"),
        ((["a", "b", "c"], broken(2, 0, np.inf)), "vector 0 of number 2 of the items has length inf"),
        ((["a", "b", "c"], broken(0, 3, 1.5)), "vector 3 of number 0 of the items has length 1.5"),
        ((["a", "b", "c"], broken(0, 3, 0)), "vector 3 of number 0 of the items has length 0"),
        ((["a", "b", "c"], CANDIDATES[:3], [{}, {"id": "c"}, {}]), "item 'b': its metadata is {'id': 'c'}"),
        ((["a", "b", "c"], CANDIDATES[:3], [{}, {}, None]), "item 'c': its metadata is None"),
        ((["a", "b", "c"], CANDIDATES[:3], [{}, {"page": {1, 2}}, {}]), "item 'b': its metadata is no JSON"),
        ((["a", "b", "c"], CANDIDATES[:3], [{}, {"page": float("nan")}, {}]), "item 'b': its metadata is no JSON"),
        ((["a", "b", "c"], CANDIDATES[:3], [{}, {"text": "\ud800"}, {}]), "item 'b': its metadata is no JSON"),
        ((["a", "b", "c"], CANDIDATES[:3], [{}, {"text": "x" * (28 << 20)}, {}]), "item 'b': with 29,"),
    ],
)
def test_bad_items_are_named_and_nothing_is_written(small, arguments, message):
    with pytest.raises(UserError) as error:
        small.add(*arguments)
    assert message in str(error.value) and len(small) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((QUERIES, 0), "k=0"),
        ((QUERIES, 2.5), "k=2.5"),
        ((QUERIES, 10, [(1, 1, 5), (16, 64)]), "k=10: expected a whole number from 1, and of no more than survive"),
        ((QUERIES, 10, (4, 8)), "has all 64 of an item, and the first alone"),
        ((QUERIES, 10, [(2, 4, 50), (16, 64)]), "candidate_vectors=4"),
        ((QUERIES, 10, (16, 128)), "16 a query and 64 a candidate"),
        ((QUERIES, 10, (32, 64)), "16 a query and 64 a candidate"),
        ((QUERIES[:, :, :16], 10), "takes [items, vectors, 32]"),
        ((QUERIES[0], 10), "takes [items, vectors, 32]"),
        ((QUERIES * 2, 10), "vector 0 of number 0 of the queries has length 2"),
    ],
)
def test_bad_searches_are_refused(index, arguments, message):
    with pytest.raises(UserError) as error:
        index.search(*arguments)
    assert message in str(error.value)


def test_a_collection_of_other_vectors_is_refused():
    client = QdrantClient(":memory:")
    QdrantIndex.create(client, "icons", 32, 64, "model a")
    QdrantIndex.create(client, "icons", 32, 64, "model a")
    for arguments, message in [
        ((16, 64, "model a"), "collection 'icons' is of dimension=32, not 16"),
        ((32, 16, "model a"), "is of candidate_vectors=64, not 16"),
        ((32, 64, "model b"), "is of fingerprint='model a', not 'model b'"),
    ]:
        with pytest.raises(UserError, match=message):
            QdrantIndex.create(client, "icons", *arguments)
    with pytest.raises(UserError, match="is of the model 'model a', not 'model b'"):
        QdrantIndex.load(client, "icons", "model b")
    with pytest.raises(UserError, match="has no collection 'boards'"):
        QdrantIndex.load(client, "boards")
    client.create_collection("theirs", {})
    for other in (lambda: QdrantIndex.load(client, "theirs"), lambda: QdrantIndex.create(client, "theirs", 32, 64)):
        with pytest.raises(UserError, match="does not say of what it is"):
            other()


def test_vectors_beyond_what_qdrant_takes_are_refused():
    with pytest.raises(UserError, match="lower candidate_vectors"):
        QdrantIndex.create(":memory:", "wide", 32768, 64)
    for sizes in ((8.5, 4), (8, "4")):
        with pytest.raises(UserError, match="are whole numbers"):
            QdrantIndex.create(":memory:", "odd", *sizes)


def test_numbers_of_numpy_are_taken():
    index = QdrantIndex.create(":memory:", "numpy", np.int64(32), np.int32(4))
    index.add(["a", "b"], CANDIDATES[:2, :4])
    assert index.search(QUERIES[:1], np.int64(2), np.array([16, 4]))[1].shape == (1, 2)


def test_unknown_items_are_named(small):
    with pytest.raises(UserError, match="collection 'small' has no item 'x'"):
        small.about(["x"])


def test_without_a_server_one_line_says_so():
    with pytest.raises(UserError, match="Qdrant at http://127.0.0.1:9: does not answer .*refused"):
        QdrantIndex.load("http://127.0.0.1:9", "icons")


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        QdrantIndex.load(tmp_path / "none", "icons")
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Qdrant at .*file: "):
        QdrantIndex.create(tmp_path / "file", "icons", 32, 64)
    with pytest.raises(UserError, match="cannot contain '/'"):
        QdrantIndex.create(":memory:", "a/b", 32, 64)
    with closing(QdrantIndex.create(tmp_path / "db", "icons", 32, 64)), pytest.raises(UserError, match="already accessed"):
        QdrantIndex.load(str(tmp_path / "db"), "icons")


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    with pytest.raises(UserError, match=r"pip install 'metaembed-jax\[qdrant\]'"):
        QdrantIndex.create(":memory:", "icons", 32, 64)


def test_the_documentation_prints_what_it_says(capsys):
    code, printed = re.search(r"```python\n(.*?)```\n+```\n(.*?)```", DOCUMENTATION.read_text(encoding="utf-8"), re.DOTALL).groups()
    exec(code, {})
    assert capsys.readouterr().out == printed
