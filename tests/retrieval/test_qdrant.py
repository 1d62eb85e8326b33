"""Qdrant, embedded, against exact search; and the requests that its client sends to a server."""

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
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.stages import as_stages, search_in_stages
from metaembed_jax.retrieval import qdrant_points
from metaembed_jax.retrieval.qdrant import QdrantIndex
from tests.retrieval import fake_qdrant
from tests.retrieval.fake_model import FakeModel

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


QUERIES, DOCUMENTS = unit_vectors(2, 4, 16), unit_vectors(1, 2000, 64)


@pytest.fixture(scope="module", params=["client", "edge"])
def index(request, tmp_path_factory):
    location = ":memory:" if request.param == "client" else f"edge:{tmp_path_factory.mktemp('edge')}"
    with closing(QdrantIndex.create(location, "icons", WIDTH, 64, "model a")) as index:
        index.add(names(2000), DOCUMENTS)
        yield index


@pytest.fixture(params=["client", "edge"])
def small(request, tmp_path):
    location = ":memory:" if request.param == "client" else f"edge:{tmp_path}"
    with closing(QdrantIndex.create(location, "small", WIDTH, 4)) as index:
        yield index


def expected(documents, budget, k):
    """Return scores and names of exact search; no two scores are so close that rounding could swap them."""

    def score(pair, rows):
        scores = np.asarray(me.maxsim(QUERIES, documents, pair))
        return scores if rows is None else np.take_along_axis(scores, rows, axis=1)

    scores, rows = search_in_stages(score, as_stages(budget, Budget(16, 64)), k + 1)
    assert np.diff(-scores).min() > 1e-4
    scores, rows = scores[:, :k], rows[:, :k]
    return scores, np.array(names(len(documents)), object)[rows]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_embedded_equals_exact_search(index, budget):
    scores, ids = index.search(QUERIES, 10, budget)
    expected_scores, expected_ids = expected(DOCUMENTS, budget, 10)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)


def test_without_a_budget_all_vectors_are_used(index):
    np.testing.assert_array_equal(index.search(QUERIES)[1], expected(DOCUMENTS, (16, 64), 10)[1])


def test_fewer_items_than_results(small):
    assert [x.shape for x in small.search(QUERIES, 2)] == [(4, 0), (4, 0)]
    small.add(["a", "b"], DOCUMENTS[:2])
    scores, ids = small.search(QUERIES, 3)
    assert scores.shape == ids.shape == (4, 2) and np.isfinite(scores).all() and all(set(row) == {"a", "b"} for row in ids)
    assert [x.shape for x in small.search(QUERIES[:0], 3)] == [(0, 3), (0, 3)]


def test_missing_results_are_none(small, monkeypatch):
    """The graph of a server may reach fewer items for some queries than for others."""
    small.add(["a", "b"], DOCUMENTS[:2], [{"page": 1}, {"page": 2}])
    query = small.collection.query

    def answer_less(requests):
        first, *others = query(requests)
        return [first[:-1], *others]

    monkeypatch.setattr(small.collection, "query", answer_less)
    hits = small.search(QUERIES, 3)
    assert hits.ids.shape == (4, 2) and hits.ids[0, 1] is None and np.isneginf(hits.scores[0, 1])
    assert np.isfinite(hits.scores[1:]).all() and len(hits.metadata(0)) == 1
    assert [fields["page"] for fields in hits.metadata(3)] == ["ab".index(item) + 1 for item in hits.ids[3]]


def test_one_vector_an_item_is_stored_once():
    index = QdrantIndex.create(":memory:", "first", WIDTH, 1)
    index.add(names(50), DOCUMENTS[:50])
    assert index.client.get_collection("first").config.params.vectors.keys() == {"first"}
    scores, ids = index.search(QUERIES, 5, (16, 1))
    expected_scores, expected_ids = expected(DOCUMENTS[:50], (16, 1), 5)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)


def test_only_the_first_vectors_are_stored(small):
    small.add(names(50), DOCUMENTS[:50])
    np.testing.assert_array_equal(small.search(QUERIES, 5)[1], expected(DOCUMENTS[:50], (16, 4), 5)[1])


def test_metadata(small):
    metadata = [
        {"path": "fôlder/日本語 🙂.pdf", "page": 3, "text": "Ω ≠ \x00 \u2028 <b>"},
        {"path": None, "page": None, "text": "", "tags": ("a", "b")},
        {"id": "\n"},
    ]
    small.add(["é", "e\u0301", "\n"], DOCUMENTS[:3], metadata)
    assert len(small) == 3
    assert small.metadata(["e\u0301", "é", "\n"]) == [
        {"path": None, "page": None, "text": "", "tags": ["a", "b"], "id": "e\u0301"},
        metadata[0] | {"id": "é"},
        {"id": "\n"},
    ]


def test_items_with_the_same_id_are_replaced(small):
    small.add(["a", "b"], DOCUMENTS[:2], [{"page": 1}, {"page": 2}])
    small.add(["b", "c"], DOCUMENTS[3:5], [{"page": 4}, {"page": 5}])
    assert len(small) == 3 and [item["page"] for item in small.metadata(["a", "b", "c"])] == [1, 4, 5]
    scores = np.asarray(me.maxsim(QUERIES, DOCUMENTS[[0, 3, 4], :4]))
    np.testing.assert_allclose(small.search(QUERIES, 3)[0], -np.sort(-scores), atol=1e-5)


def test_a_killed_upload_resumes(tmp_path, monkeypatch):
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
            index.add(ids, DOCUMENTS[:100], [{"page": n} for n in range(100)])

    with closing(QdrantIndex.create(tmp_path / "db", "icons", WIDTH, 64, "model a")) as index:
        assert len(index) == 70
        missing = index.missing(ids)
        assert missing == list(range(70, 100))
        index.add([ids[n] for n in missing], DOCUMENTS[missing], [{"page": n} for n in missing])

    with closing(QdrantIndex.load(tmp_path / "db", "icons")) as index:
        assert len(index) == 100 and index.missing([*ids, "new"]) == [100]
        assert [metadata["page"] for metadata in index.metadata(ids)] == list(range(100))
        np.testing.assert_array_equal(index.search(QUERIES, 10)[1], expected(DOCUMENTS[:100], (16, 64), 10)[1])


def test_a_bar_shows_the_upload(small, capsys):
    small.add(names(70), DOCUMENTS[:70], progress=True)
    assert "70/70" in capsys.readouterr().err
    small.add(names(70), DOCUMENTS[:70])
    assert not capsys.readouterr().err


def test_requests_to_a_server(monkeypatch):
    monkeypatch.setattr(qdrant_points, "REQUEST_BYTES", 2 << 20)
    stages = [(1, 1, 100), (16, 64)]
    with fake_qdrant.serve() as (url, requests):
        index = QdrantIndex.create(url, "icons", WIDTH, 64, "model a", shard_number=6, replication_factor=2)
        index.add(names(150), DOCUMENTS[:150], [{"text": "日本語"}] * 150)
        assert len(index) == 150 and index.missing(["item 7", "new"]) == [1]
        assert index.metadata(["item 7"]) == [{"text": "日本語", "id": "item 7"}]
        ids = QdrantIndex.load(url, "icons", "model a").search(QUERIES, 10, stages, exact=True)[1]
        np.testing.assert_array_equal(ids, expected(DOCUMENTS[:150], stages, 10)[1])
    assert max(length for _, _, length in requests) < 2 << 20
    bodies = {name: [body for request, body, _ in requests if request == name] for name, _, _ in requests}
    (collection,), (batch,) = bodies["PUT /collections/icons"], bodies["POST /collections/icons/points/query/batch"]
    assert (collection["shard_number"], collection["replication_factor"]) == (6, 2)
    assert collection["vectors"]["all"]["hnsw_config"] == {"m": 0} and "hnsw_config" not in collection["vectors"]["first"]
    assert collection["vectors"]["all"]["multivector_config"] == {"comparator": "max_sim"}
    assert {config["distance"] for config in collection["vectors"].values()} == {"Dot"}
    assert [len(body["points"]) for body in bodies["PUT /collections/icons/points"]] == [41, 41, 41, 27]
    assert len(batch["searches"]) == 4  # each with all stages of a query
    search = batch["searches"][0]
    assert (search["using"], search["limit"], np.shape(search["query"]["nearest"])) == ("all", 10, (16, WIDTH))
    prefetch = search["prefetch"]
    assert (prefetch["using"], prefetch["limit"], np.shape(prefetch["query"])) == ("first", 100, (WIDTH,))
    assert prefetch["params"]["exact"] and "params" not in search


def test_requests_are_of_bounded_size(monkeypatch):
    items = list(qdrant_points.as_requests([10] * 130)), list(qdrant_points.as_requests([]))
    assert items == ([range(64), range(64, 128), range(128, 130)], [])
    monkeypatch.setattr(qdrant_points, "REQUEST_BYTES", 100)
    rows = [range(2), range(2, 3), range(3, 4), range(4, 5), range(5, 6)]
    assert list(qdrant_points.as_requests([60, 40, 1, 100, 99, 2])) == rows


def test_the_length_of_a_number_as_json():
    numbers = np.frombuffer(np.random.default_rng(0).bytes(40_000), np.float32)
    unit = np.concatenate([DOCUMENTS[:20].ravel(), numbers[np.abs(numbers) < 1]])
    assert max(len(json.dumps(number) + ",") for number in unit.tolist()) <= qdrant_points.NUMBER_BYTES


def broken(number, vector, value):
    vectors = DOCUMENTS[:3, :4].copy()
    vectors[number, vector] *= value
    return vectors


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "b", "a"], DOCUMENTS[:3]), "'a' is given twice, at numbers 0 and 2"),
        ((["a", "", "c"], DOCUMENTS[:3]), "id '' at number 1"),
        ((["a", 2, "c"], DOCUMENTS[:3]), "id 2 at number 1"),
        ((["a", "b", "\ud800"], DOCUMENTS[:3]), "expected text that can be encoded in UTF-8"),
        (("abc", DOCUMENTS[:3]), "expected a list of ids"),
        ((3, DOCUMENTS[:3]), "expected a list of ids"),
        ((iter("abc"), DOCUMENTS[:3]), "expected a list of ids"),
        ((["a", "b", "c"], DOCUMENTS[:3] * 1j), "items: expected an array of real numbers"),
        ((["a", "b"], DOCUMENTS[:3]), "2 ids, vectors of 3 items, metadata of 2"),
        ((["a", "b", "c"], DOCUMENTS[:3], [{}]), "metadata of 1"),
        ((["a", "b", "c"], DOCUMENTS[:3, :2]), "items have 2 vectors: expected at least 4, which collection 'small' stores"),
        ((["a", "b", "c"], DOCUMENTS[:3, :, :8]), "expected [items, vectors, 32]"),
        ((["a", "b", "c"], [[1.0], [2.0, 3.0], []]), "items: expected an array of numbers"),
        ((["a", "b", "c"], broken(1, 2, np.nan)), "vector 2 of number 1 of the items has length nan"),
        ((["a", "b", "c"], broken(2, 0, np.inf)), "vector 0 of number 2 of the items has length inf"),
        ((["a", "b", "c"], broken(0, 3, 1.5)), "vector 3 of number 0 of the items has length 1.5"),
        ((["a", "b", "c"], broken(0, 3, 0)), "vector 3 of number 0 of the items has length 0"),
        ((["a", "b", "c"], DOCUMENTS[:3], [{}, {"id": "c"}, {}]), "item 'b': its metadata is {'id': 'c'}"),
        ((["a", "b", "c"], DOCUMENTS[:3], [{}, {}, None]), "item 'c': its metadata is None"),
        ((["a", "b", "c"], DOCUMENTS[:3], [{}, {"page": {1, 2}}, {}]), "item 'b': its metadata cannot be written as JSON"),
        ((["a", "b", "c"], DOCUMENTS[:3], [{}, {"page": float("nan")}, {}]), "item 'b': its metadata cannot be written as JSON"),
        ((["a", "b", "c"], DOCUMENTS[:3], [{}, {"text": "\ud800"}, {}]), "item 'b': its metadata cannot be written as JSON"),
        ((["a", "b", "c"], DOCUMENTS[:3], [{}, {"text": "x" * (28 << 20)}, {}]), "item 'b' has 29,"),
    ],
)
def test_bad_items_are_named_and_nothing_is_written(small, arguments, message):
    with pytest.raises(UserError) as error:
        small.add(*arguments)
    assert message in str(error.value) and len(small) == 0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((QUERIES, 0), "k=0"),
        ((QUERIES, 2.5), "k=2.5"),
        ((QUERIES, 10, [(1, 1, 5), (16, 64)]), "k=10: expected a positive integer, at most the survivors"),
        ((QUERIES, 10, (4, 8)), "expected 1 or 64, which collection 'icons' stores"),
        ((QUERIES, 10, [(2, 4, 50), (16, 64)]), "document_vectors=4"),
        ((QUERIES, 10, (16, 64, 8)), "budget 16:64x8: expected budgets without a width"),
        ((QUERIES, 10, (16, 128)), "16 of a query and 64 of a document"),
        ((QUERIES, 10, (32, 64)), "16 of a query and 64 of a document"),
        ((QUERIES[:, :, :16], 10), "expected [items, vectors, 32]"),
        ((QUERIES[0], 10), "expected [items, vectors, 32]"),
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
        ((16, 64, "model a"), "collection 'icons' has dimension=32, not 16"),
        ((32, 16, "model a"), "has document_vectors=64, not 16"),
        ((32, 64, "model b"), "has fingerprint='model a', not 'model b'"),
    ]:
        with pytest.raises(UserError, match=message):
            QdrantIndex.create(client, "icons", *arguments)
    with pytest.raises(UserError, match="vectors of the model 'model a', not 'model b'"):
        QdrantIndex.load(client, "icons", "model b")
    with pytest.raises(UserError, match="has no collection 'boards'"):
        QdrantIndex.load(client, "boards")
    client.create_collection("theirs", {})
    for other in (lambda: QdrantIndex.load(client, "theirs"), lambda: QdrantIndex.create(client, "theirs", 32, 64)):
        with pytest.raises(UserError, match="does not record its vectors"):
            other()


def test_too_many_numbers_are_refused():
    with pytest.raises(UserError, match="lower document_vectors"):
        QdrantIndex.create(":memory:", "wide", 32768, 64)
    for sizes in ((8.5, 4), (8, "4")):
        with pytest.raises(UserError, match="expected positive integers"):
            QdrantIndex.create(":memory:", "odd", *sizes)


@pytest.mark.usefixtures("unchecked")
def test_a_fingerprint_is_a_text(tmp_path):
    for location in ":memory:", f"edge:{tmp_path}":
        with pytest.raises(UserError, match="fingerprint=None: expected a text"):
            QdrantIndex.create(location, "icons", 8, 4, None)


def test_numbers_of_numpy_are_taken():
    index = QdrantIndex.create(":memory:", "numpy", np.int64(32), np.int32(4))
    index.add(["a", "b"], DOCUMENTS[:2, :4])
    assert index.search(QUERIES[:1], np.int64(2), np.array([16, 4]))[1].shape == (1, 2)


def test_the_model_is_checked(small):
    model = FakeModel("model a")
    QdrantIndex.create(":memory:", "recorded", WIDTH, 4, "model a").check_model(model)
    for index, recorded in (small, "does not record its model"), (QdrantIndex.create(":memory:", "b", 8, 4, "b"), "the model 'b'"):
        with pytest.raises(UserError, match=f"{recorded}, expected this one, 'model a'"):
            index.check_model(model)


def test_unknown_items_are_named(small):
    with pytest.raises(UserError, match="collection 'small' has no item 'x'"):
        small.metadata(["x"])


def test_without_a_server_the_error_names_it():
    with pytest.raises(UserError, match="Qdrant at http://127.0.0.1:9 does not answer .*refused"):
        QdrantIndex.load("http://127.0.0.1:9", "icons")


@pytest.mark.parametrize("location", ["localhost:6333", "ftp://localhost", ""])
def test_locations_that_are_no_server_and_no_folder(location):
    with pytest.raises(UserError, match="expected http://HOST:PORT"):
        QdrantIndex.create(location, "icons", 32, 64)


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


def test_the_output_in_the_documentation(capsys):
    code, printed = re.search(r"```python\n(.*?)```\n+```\n(.*?)```", DOCUMENTATION.read_text(encoding="utf-8"), re.DOTALL).groups()
    exec(code, {})
    assert capsys.readouterr().out == printed
