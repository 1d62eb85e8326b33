"""Indexes that follow a folder or a table: what is encoded again, what is kept, and what is gone."""

import json
import os

import numpy as np
import pytest

import metaembed_jax as me
from metaembed_jax.retrieval import build, parts, store
from tests.data.field_files import inline, picture, write_parquet
from tests.retrieval.fake_model import FakeModel, content, vectors
from tests.retrieval.following_files import check, save, spoil, stored_vectors


@pytest.fixture
def model():
    return FakeModel()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "PART_DOCUMENTS", 4)


def index(model, path, **options):
    """Index what `path` holds in a folder next to it, check that it is what the documents give, and return it."""
    documents = me.open_documents(path, skip=options.get("skip", 0))
    built = me.index_documents(model, documents, path.parent / "index", dtype="float32", **options)
    check(built, documents)
    return built


def files(built):
    """Return all files of an index but the lock, with their contents and times."""
    paths = sorted(path for path in built.folder.rglob("*") if path.is_file() and path.name != "lock")
    return [(path, path.read_bytes(), path.stat().st_mtime_ns) for path in paths]


class Killed(BaseException):
    pass


def die(patch, module, name, calls):
    """Let a function kill the job after so many calls."""
    original, called = getattr(module, name), []

    def call(*arguments):
        if len(called) == calls:
            raise Killed
        called.append(None)
        return original(*arguments)

    patch.setattr(module, name, call)


def content_of_segments(built):
    return [{file.name: file.read_bytes() for file in segment.folder.iterdir()} for segment in built._segments]


def test_a_folder(model, tmp_path, capsys):
    folder = tmp_path / "in"
    for number in range(6):
        save(folder / f"{number}.png", (number, 0, 0))
    save(folder / "a.pdf", "red", "lime")
    save(folder / "b.tif", "blue", "white", "black")
    index(model, folder, progress=True)
    assert model.count() == 11
    assert capsys.readouterr().out == f"{tmp_path}/index: 11 items (11 encoded, 0 kept, 0 dropped), 4 vectors each.\n"
    before = files(index(model, folder, progress=True))
    assert capsys.readouterr().out == f"{tmp_path}/index: 11 items, nothing new, changed or gone, 4 vectors each.\n"
    assert before == files(index(model, folder)) and model.count() == 0
    save(folder / "2.png", (9, 9, 9))
    (folder / "4.png").unlink()
    save(folder / "sub" / "new.png", "yellow")
    save(folder / "a.pdf", "red", "navy", "pink")
    save(folder / "b.tif", "blue", "white")
    index(model, folder, progress=True)
    assert model.count() == 1 + 1 + 3 + 2
    assert capsys.readouterr().out == f"{tmp_path}/index: 11 items (7 encoded, 4 kept, 2 dropped), 4 vectors each.\n"
    status = (folder / "2.png").stat()
    save(folder / "2.png", (8, 8, 8))  # of the same size
    os.utime(folder / "2.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    index(model, folder)
    assert model.count() == 1


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_table(model, tmp_path, ending):
    rows = [{"id": f"row {n}", "text": f"text {n}", "image": None, "price": 3} for n in range(9)]
    rows[7] |= {"image": "a.png"}
    rows[8] |= {"text": None, "image": "b.png"}
    path = tmp_path / f"items.{ending}"
    save(tmp_path / "a.png", "red")
    save(tmp_path / "b.png", "lime")

    def write():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows)) if ending == "jsonl" else write_parquet(path, rows)

    write()
    index(model, path)
    write()
    index(model, path)
    assert model.count() == 9  # the table is another file with the same rows
    save(tmp_path / "a.png", "navy")
    index(model, path)
    assert model.count() == 1
    rows[2]["text"], rows[3]["price"] = "another text", 4
    del rows[5]
    rows.insert(0, {"id": "new", "text": "text 5", "image": None, "price": 3})
    write()
    index(model, path)
    assert model.count() == 3


def test_bytes_in_a_table(model, tmp_path):
    rows = [{"image": inline(picture(number))} for number in range(5)]
    write_parquet(tmp_path / "items.parquet", rows)
    index(model, tmp_path / "items.parquet")
    rows[3]["image"] = inline(picture(30))
    write_parquet(tmp_path / "items.parquet", rows)
    index(model, tmp_path / "items.parquet")
    assert model.count() == 5 + 1


def test_a_missing_image_that_appears_is_a_change(tmp_path):
    (tmp_path / "items.jsonl").write_text('{"text": "x"}\n{"text": "y", "image": "a.png"}\n')
    before = me.open_documents(tmp_path / "items.jsonl").stamps()
    save(tmp_path / "a.png", "red")
    assert (me.open_documents(tmp_path / "items.jsonl").stamps() == before).tolist() == [True, False]


def test_a_killed_job_ends_as_one_that_was_not(model, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    for number in range(11):
        save(folder / f"{number}.png", (number, 0, 0))
    whole = me.index_documents(FakeModel(), me.open_documents(folder), tmp_path / "whole", dtype="float32")
    kills = [("write_draft", 0, 4), ("write_draft", 1, 8), ("write_draft", 1, 7), ("commit", 0, 3), ("_replace", 0, 0)]
    for name, calls, encoded in kills:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die(patch, store, name, calls)
            index(model, folder)
        assert model.count() == encoded
    built = index(model, folder)
    assert model.count() == 0 and content_of_segments(built) == content_of_segments(whole)
    before = stored_vectors(built)
    save(folder / "3.png", "red")
    save(folder / "new.png", "lime")
    for module, name in [(store, "write_draft"), (build, "merge_tiers"), (store, "sync_folder"), (store, "clean")]:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die(patch, module, name, 1 if name == "clean" else 0)
            index(model, folder)
    after = stored_vectors(index(model, folder))
    assert model.count() == 4 and len(after) == 12
    for item in before.keys() - {"3.png"}:
        np.testing.assert_array_equal(after[item], before[item])


def test_a_job_killed_after_its_commit(model, tmp_path, monkeypatch):
    """The draft still names the segment that the manifest names."""
    save(tmp_path / "in" / "a.png", "red")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die(patch, store, "clean", 1)
        patch.setattr(store.Path, "unlink", lambda *_, **__: None)
        index(model, tmp_path / "in")
    index(model, tmp_path / "in")
    save(tmp_path / "in" / "b.png", "lime")
    index(model, tmp_path / "in")
    assert model.count() == 2


def test_thirty_follow_ups_leave_few_segments(model, tmp_path):
    folder, most = tmp_path / "in", 0
    for number in range(30):
        save(folder / f"{number:02}.png", (number, 0, 0))
        if number % 5 == 4:
            (folder / f"{number - 3:02}.png").unlink()
        built = index(model, folder)
        most = max(most, len(built._segments))
        assert all(2 * len(segment.entry.deleted) <= len(segment) for segment in built._segments)
    assert model.count() == 30 and 1 < most <= 5


def test_a_long_job_has_few_parts(model, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_DOCUMENTS", 1)
    monkeypatch.setattr(parts, "SIMILAR_PARTS", 3)
    for number in range(20):
        save(tmp_path / "in" / f"{number}.png", (number, 0, 0))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die(patch, store, "commit", 0)
        index(model, tmp_path / "in")
    assert [segment.items for segment in store.decode(tmp_path / "index" / "draft.json").segments] == [9, 9, 1, 1]
    assert len([path for path in (tmp_path / "index").iterdir() if path.is_dir()]) == 4 + 1  # the merged one
    built = index(model, tmp_path / "in")
    assert model.count() == 20 and built._segments[0].ids(range(20)) == me.open_documents(tmp_path / "in").ids()


def test_the_order_of_items_is_kept(model, tmp_path):
    for name in ("c", "d", "a"):
        save(tmp_path / "in" / f"{name}.png", "red")
        built = index(model, tmp_path / "in")
    scores, ids = built.search(vectors(content(me.open_documents(tmp_path / "in")[0]))[None], 3)
    assert ids.tolist() == [["c.png", "d.png", "a.png"]] and len({*scores[0].tolist()}) == 1


@pytest.mark.parametrize("name", ["vectors-0-1", "stamps", "checksums", None])
def test_a_damaged_segment_is_encoded_again(model, tmp_path, name, capsys):
    folder = tmp_path / "in"
    for number in range(9):
        save(folder / f"{number}.png", (number, 0, 0))
    index(model, folder)
    save(folder / "new.png", "red")
    built = index(model, folder)
    assert model.count() == 10 and len(built._segments) == 2
    file = built._segments[0].folder / (name or "ids")
    if name:
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    else:
        file.unlink()
    capsys.readouterr()
    index(model, folder).verify()
    assert model.count() == 9
    assert f"{tmp_path}/index: 9 items are damaged; their documents are encoded again" in capsys.readouterr().out


def test_another_budget_or_model_replaces_all(model, tmp_path):
    save(tmp_path / "in" / "a.png", "red")
    save(tmp_path / "in" / "b.png", "lime")
    index(model, tmp_path / "in")
    me.index_documents(model, me.open_documents(tmp_path / "in"), tmp_path / "index", dtype="float32", budget=2)
    assert model.count() == 4 and me.Index.load(tmp_path / "index").vectors == 2
    index(model, tmp_path / "in")
    assert model.count() == 2
    index(other := FakeModel("e" * 16), tmp_path / "in")
    assert other.count() == 2
    other.processor.fingerprint = "images of 64 tokens"
    index(other, tmp_path / "in")
    assert other.count() == 2
    assert len(me.Index.load(tmp_path / "index")._segments) == 1


def test_changes_by_hand_are_taken_back(model, tmp_path):
    for name in "abc":
        save(tmp_path / "in" / f"{name}.png", "red")
    built = index(model, tmp_path / "in")
    built.delete(["b.png"])
    built.add(vectors("1")[None], ["by hand"])
    built.compact()
    index(model, tmp_path / "in")
    assert model.count() == 4


def test_everything_replaced(model, tmp_path):
    save(tmp_path / "in" / "a.png", "red")
    index(model, tmp_path / "in")
    (tmp_path / "in" / "a.png").unlink()
    save(tmp_path / "in" / "b.png", "red")
    assert len(index(model, tmp_path / "in")._segments) == 1


def test_a_bad_document(model, tmp_path, capsys):
    folder = tmp_path / "in"
    for number in range(10):
        save(folder / f"{number}.png", (number, 0, 0))
    whole = spoil(folder / "9.png")
    message = f"{folder}/9.png: the image cannot be read .*; --skip=1 leaves out as many"
    for encoded in (9, 0):
        with pytest.raises(me.UserError, match=message):
            index(model, folder)
        assert model.count() == encoded
    built = index(model, folder, skip=1, progress=True)
    assert model.count() == 0
    (left_out,) = built.left_out
    assert left_out.id == "9.png" and left_out.reason.startswith(f"{folder}/9.png: the image cannot be read")
    counts = "9 items (0 encoded, 9 kept, 0 dropped, 1 left out), 4 vectors each."
    assert capsys.readouterr().out == f"{tmp_path}/index: {counts}\n  left out 9.png: {left_out.reason}\n"
    before = files(built)
    assert before == files(index(model, folder, skip=1)) and me.Index.load(built.folder).left_out == built.left_out
    with pytest.raises(me.UserError, match=message):
        index(model, folder)
    assert model.count() == 0
    (folder / "9.png").write_bytes(whole)
    assert not index(model, folder).left_out and model.count() == 1


def test_bad_documents_in_the_middle(model, tmp_path):
    """More than are skipped: one error, after which nothing that was encoded is encoded again."""
    folder = tmp_path / "in"
    for number in range(20):
        save(folder / f"{number}.png", (number, 0, 0))
    for number in (1, 9, 10, 17):
        spoil(folder / f"{number}.png")
    with pytest.raises(me.UserError, match=f"{folder}/1.png: .*; 3 documents so far cannot be read; --skip=3 leaves"):
        index(model, folder, skip=2)
    assert model.count() == 9
    with pytest.raises(me.UserError, match=f"{folder}/1.png: .*; 4 documents so far cannot be read; --skip=4 leaves"):
        index(model, folder, skip=3)
    assert model.count() == 7
    built = index(model, folder, skip=4)
    assert model.count() == 0 and [item for item, _ in built.left_out] == ["1.png", "9.png", "10.png", "17.png"]


def test_a_resumed_job_does_not_try_again_what_it_left_out(model, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    for number in range(11):
        save(folder / f"{number}.png", (number, 0, 0))
    spoil(folder / "2.png")
    (folder / "a.pdf").write_bytes(b"")
    whole = me.index_documents(model, me.open_documents(folder, skip=2), tmp_path / "whole", dtype="float32", skip=2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die(patch, store, "write_draft", 2)
        index(model, folder, skip=2)
    built = index(model, folder, skip=2)
    assert content_of_segments(built) == content_of_segments(whole) and built.left_out == whole.left_out
    assert [item for item, _ in built.left_out] == ["a.pdf", "2.png"]
    assert model.count() == 10 + 10 + 3  # the last part, of three, was lost


def test_a_document_that_breaks_is_dropped(model, tmp_path):
    for name in "ab":
        save(tmp_path / "in" / f"{name}.png", "red")
    index(model, tmp_path / "in")
    spoil(tmp_path / "in" / "b.png")
    with pytest.raises(me.UserError, match="b.png: the image"):
        index(model, tmp_path / "in")
    assert len(me.Index.load(tmp_path / "index")) == 2
    assert len(index(model, tmp_path / "in", skip=1)) == 1 and model.count() == 2


def test_nothing_that_can_be_read(model, tmp_path):
    save(tmp_path / "in" / "a.png", "red")
    spoil(tmp_path / "in" / "a.png")
    with pytest.raises(me.UserError, match="nothing to index: none of 1 documents can be read"):
        index(model, tmp_path / "in", skip=3)
    (tmp_path / "in" / "a.png").rename(tmp_path / "in" / "a.pdf")
    with pytest.raises(me.UserError, match="nothing to index: expected at least one document"):
        index(model, tmp_path / "in", skip=3)
    with pytest.raises(me.UserError, match="skip=None: expected"):
        index(model, tmp_path / "in", skip=None)


@pytest.mark.parametrize("ids", [("a", "row 1 of items.jsonl", "c"), ("0", "1", "2")])
def test_a_row_that_cannot_be_read(model, tmp_path, ids):
    rows = [{"text": "x"}, None, {"text": "y"}]
    if ids[0] == "a":
        rows = [row and row | {"id": item} for row, item in zip(rows, ids, strict=True)]
    lines = [json.dumps(row) if row else '{"text": "cut' for row in rows]
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(me.UserError, match=f"{path}, row 1 is not JSON .*; --skip=1 leaves out as many"):
        index(model, path)
    built = index(model, path, skip=1)
    assert [item for item, _ in built.left_out] == [ids[1]] and model.count() == 2
    path.write_text("\n".join([lines[0], json.dumps({"text": "z"} | ({"id": "b"} if ids[0] == "a" else {})), lines[2]]))
    assert not index(model, path).left_out and model.count() == 1


def test_a_bad_row(model, tmp_path):
    rows = [{"id": "a", "text": "x"}, {"id": "b", "image": "none.png"}, {"id": "c", "text": "y"}]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    built = index(model, tmp_path / "items.jsonl", skip=1)
    assert [item for item, _ in built.left_out] == ["b"] and "row 1: image: the image" in built.left_out[0].reason
    save(tmp_path / "none.png", "red")
    assert not index(model, tmp_path / "items.jsonl").left_out and model.count() == 3
