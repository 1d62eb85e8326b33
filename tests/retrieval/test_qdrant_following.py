"""A collection that follows an index: what is written, kept and deleted, after changes and after a kill."""

from contextlib import closing

import numpy as np
import pytest

import metaembed_jax as me
from metaembed_jax import cli
from metaembed_jax.errors import UserError
from metaembed_jax.retrieval import stored_items
from metaembed_jax.retrieval.qdrant import QdrantIndex
from metaembed_jax.retrieval.qdrant_following import Followed
from tests.retrieval import fake_qdrant
from tests.retrieval.test_qdrant import DOCUMENTS, QUERIES, WIDTH, names, unit_vectors

ROWS = DOCUMENTS[:150, :8]
FIELDS = [{"page": number, "text": "日本語"} for number in range(150)]


@pytest.fixture(params=["client", "edge", "server"])
def collection(request, tmp_path):
    if request.param == "server":
        with fake_qdrant.serve() as (url, _):
            yield QdrantIndex.create(url, "pages", WIDTH, 8)
        return
    location = ":memory:" if request.param == "client" else f"edge:{tmp_path / 'edge'}"
    with closing(QdrantIndex.create(location, "pages", WIDTH, 8)) as collection:
        yield collection


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(stored_items, "BLOCK_ITEMS", 30)


def assert_equal(collection, index):
    expected = index.search(QUERIES[:, :4], 20)
    hits = collection.search(QUERIES[:, :4], 20)
    np.testing.assert_array_equal(hits.ids, expected.ids)
    np.testing.assert_allclose(hits.scores, expected.scores, atol=1e-5)
    assert hits.metadata(2) == expected.metadata(2) and len(collection) == len(index)


@pytest.mark.usefixtures("small_blocks")
def test_changes_are_followed(collection):
    index = me.Index.build(ROWS[:100], names(100), metadata=FIELDS[:100], dtype="float32")
    collection.add(["not in the index"], ROWS[:1])
    assert collection.follow(index) == Followed(100, 1, 0)
    assert_equal(collection, index)
    assert collection.follow(index) == Followed(0, 0, 100)

    index.delete(names(100)[10:40])
    index.add(ROWS[100:], names(150)[100:], metadata=FIELDS[100:])
    index.add(ROWS[10:12, ::-1], names(12)[10:], metadata=FIELDS[10:12])  # other vectors
    index.add(ROWS[12:13], ["item 12"], metadata=[{"page": -1}])  # other metadata
    index.add(ROWS[13:14], ["item 13"], metadata=FIELDS[13:14])  # as before
    index.delete(["item 149"])
    assert collection.follow(index) == Followed(49 + 3, 26, 71)
    assert_equal(collection, index)
    index.compact()
    assert collection.follow(index) == Followed(0, 0, 123)
    assert collection.metadata(["item 12"]) == [{"page": -1, "id": "item 12"}]


@pytest.mark.usefixtures("small_blocks")
def test_a_killed_run_is_continued(collection, monkeypatch):
    index, writes = me.Index.build(ROWS, names(150), dtype="float32"), []

    def killed_at_the_third(*arguments):
        if len(writes) == 2:
            raise KeyboardInterrupt
        writes.append(arguments)
        write(*arguments)

    write = collection.collection.write
    monkeypatch.setattr(collection.collection, "write", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        collection.follow(index)
    monkeypatch.undo()
    assert collection.follow(index) == Followed(90, 0, 60)
    assert_equal(collection, index)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_ragged_items_of_every_type(collection, dtype):
    """An item with one vector is found by all vectors too."""
    vectors = [row[: 1 + number % 12] for number, row in enumerate(DOCUMENTS[:60, :12])]
    index = me.Index.build(vectors, names(60), dtype=dtype)
    assert collection.follow(index) == Followed(60, 0, 0)
    expected = index.search(QUERIES[:, :4], 60, (4, 8))
    scores, ids = collection.search(QUERIES[:, :4], 60)
    np.testing.assert_allclose(scores, expected.scores, atol=1e-5)
    assert [set(row) for row in ids] == [set(names(60))] * 4
    assert collection.follow(index) == Followed(0, 0, 60)


def test_exact_vectors_are_handed_over(collection):
    index = me.Index.build(ROWS, names(150), dtype="int8", exact="float32")
    collection.follow(index)
    assert_equal(collection, me.Index.build(ROWS, names(150), dtype="float32"))


def test_an_emptied_index_empties_the_collection(collection):
    index = me.Index.build(ROWS, names(150))
    collection.follow(index)
    index.delete(names(150))
    assert collection.follow(index) == Followed(0, 150, 0) and len(collection) == 0


@pytest.mark.usefixtures("small_blocks")
def test_the_items_of_an_index_build_it_again(tmp_path):
    index = me.Index.build([row[: 1 + number % 8] for number, row in enumerate(ROWS)], names(150), metadata=FIELDS)
    index.delete(["item 3"])
    blocks = list(index.items())
    assert len(blocks) == 5 and blocks[0].metadata[3] == FIELDS[4]
    again = me.Index.build(index.items(), path=tmp_path / "again", budget=8)
    for result, expected in zip(again.search(QUERIES, 20, (16, 8)), index.search(QUERIES, 20, (16, 8)), strict=True):
        np.testing.assert_array_equal(result, expected)
    assert max(len(row) for block in index.items(3) for row in block.vectors) == 3


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("vectors", [0, 9, 2.0, "all"])
def test_items_of_more_vectors_than_are_stored(vectors):
    with pytest.raises(UserError, match="expected 1 to 8, the vectors that .* stores of an item"):
        me.Index.build(ROWS, names(150)).items(vectors)


def test_other_indexes_are_refused(collection):
    for vectors in ROWS[:3, :4], unit_vectors(3, 5, 8, 16):
        with pytest.raises(UserError, match="stores 8 vectors of 32 numbers; .* create another collection"):
            collection.follow(me.Index.build(vectors))
    with pytest.raises(UserError, match="expected a dict without another id, and without 'metaembed_stamp'"):
        collection.add(["a"], ROWS[:1], [{"metaembed_stamp": 1}])


def test_the_command(tmp_path, capsys):
    index = me.Index.build(ROWS, names(150), path=tmp_path / "index", dtype="float32")
    command = ["upload", f"--index={tmp_path / 'index'}", f"--to=edge:{tmp_path}", "--collection=pages"]
    for wrong in 0, 9:
        with pytest.raises(UserError, match=f"--vectors={wrong}: expected 1 to 8, the vectors that .* stores of an item"):
            cli.main([*command, f"--vectors={wrong}"])
    cli.main(command)  # a wrong command has created no collection
    index.delete(["item 3"])
    cli.main(command)
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(", pages: 150 written, 0 deleted, 0 kept") and second.endswith(": 0 written, 1 deleted, 149 kept")
    with closing(QdrantIndex.load(f"edge:{tmp_path}", "pages")) as collection:
        assert_equal(collection, index)
    with pytest.raises(UserError, match="has document_vectors=8, not 4"):
        cli.main([*command, "--vectors=4"])


def test_a_bar_shows_the_run(collection, capsys):
    collection.follow(me.Index.build(ROWS), progress=True)
    assert "150/150" in capsys.readouterr().err
