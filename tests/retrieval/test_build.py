"""Indexing of a folder or a table, and the commands `index` and `search`."""

import functools
import json
import sys

import jax
import numpy as np
import pytest

import metaembed_jax as me
from metaembed_jax import cli
from metaembed_jax.flags import run_main
from metaembed_jax.mesh import make_mesh
from metaembed_jax.retrieval import parts, store
from tests.backbones.qwen2_5_vl.reference import noise
from tests.checkpoints.huggingface_files import random_tensors, write
from tests.encoding.small_rows import with_small_rows

ONE = make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write(tmp_path_factory.mktemp("huggingface"), random_tensors())


@pytest.fixture(scope="module")
def model(directory):
    return with_small_rows(me.MetaEmbed.from_pretrained(directory, dtype="float32", mesh=ONE))


@pytest.fixture
def table(tmp_path):
    noise(60, 90, 1).save(tmp_path / "a.png")
    rows = [{"id": f"row {n}", "text": f"text {n} \x1b[1m\u202e"} for n in range(9)] + [{"id": "ä", "image": "a.png"}]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(parts, "PART_DOCUMENTS", 4)


def counted(documents):
    """Return a list of the numbers of the documents that are read from now on."""
    reads, item = [], documents._item
    documents._item = lambda number: (reads.append(number), item(number))[1]
    return reads


def test_an_index_of_documents(model, table, tmp_path, small_blocks):
    documents = me.open_documents(table)
    index = me.index_documents(model, documents, tmp_path / "index", budget=16, dtype="float32", name="here")
    scores, ids = index.search(model.encode_document(list(documents), budget=4), 1, (4, 16))
    assert ids[:, 0].tolist() == [documents.metadata(n)["id"] for n in range(10)]
    np.testing.assert_allclose(scores, 4, rtol=1e-4)
    assert index.metadata("row 3") == {"text": documents[3]["text"]} and index.metadata("ä") == {"path": str(tmp_path / "a.png")}
    assert len(index._segments) == 1 and index.model == "here"
    index.check_model(model)
    reads = counted(documents)
    me.index_documents(model, documents, tmp_path / "index", budget=16, dtype="float32")
    assert not reads  # it was complete
    me.index_documents(model, documents, tmp_path / "index", budget=8, dtype="float32")
    assert sorted(reads) == list(range(10)) and me.Index.load(tmp_path / "index").vectors == 8


def test_a_stopped_job_resumes(model, table, tmp_path, small_blocks, monkeypatch):
    whole = me.index_documents(model, me.open_documents(table), tmp_path / "whole", budget=4)
    before = me.Index.build(model.encode_query(["old"], budget=2), path=tmp_path / "index", mesh=ONE)
    documents = me.open_documents(table)
    reads, write_draft = counted(documents), store.write_draft
    for stop_after in (1, 0):  # blocks; the second time it stops before it has written any

        def stop(*arguments, blocks=stop_after):
            if not blocks:
                raise KeyboardInterrupt
            write_draft(*arguments)
            monkeypatch.setattr(store, "write_draft", lambda *arguments: stop(*arguments, blocks=blocks - 1))

        monkeypatch.setattr(store, "write_draft", stop)
        with pytest.raises(KeyboardInterrupt):
            me.index_documents(model, documents, tmp_path / "index", budget=4)
        assert len(me.Index.load(tmp_path / "index")) == len(before) == 1
    monkeypatch.setattr(store, "write_draft", write_draft)
    index = me.index_documents(model, documents, tmp_path / "index", budget=4)
    assert sorted(reads) == sorted([*range(10), *range(4, 10), *range(4, 10)])
    query = model.encode_query(["text 3"], budget=4)
    for expected, resumed in zip(whole.search(query, 10), index.search(query, 10), strict=True):
        np.testing.assert_array_equal(expected, resumed)
    assert len([path for path in (tmp_path / "index").iterdir() if path.is_dir()]) == 1


def test_a_damaged_part_is_encoded_again(model, table, tmp_path, small_blocks, monkeypatch):
    documents = me.open_documents(table)
    reads = counted(documents)
    with monkeypatch.context() as patch:
        patch.setattr(store, "commit", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            me.index_documents(model, documents, tmp_path / "index", budget=4)
    segment, *_ = store.decode(tmp_path / "index" / store.DRAFT).segments
    file = tmp_path / "index" / segment.name / "vectors-0-1"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    index = me.index_documents(model, documents, tmp_path / "index", budget=4)
    index.verify()
    assert len(index) == 10 and sorted(reads) == sorted([*range(10), *range(4)])


def test_another_job_starts_again(model, table, tmp_path, small_blocks, monkeypatch):
    documents = me.open_documents(table)
    reads = counted(documents)
    commit = store.commit
    monkeypatch.setattr(store, "commit", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        me.index_documents(model, documents, tmp_path / "index", budget=4)
    monkeypatch.setattr(store, "commit", commit)
    me.index_documents(model, documents, tmp_path / "index", budget=5)
    assert sorted(reads) == sorted(2 * list(range(10)))


def test_fingerprints(model, directory):
    """A model has one fingerprint, however it is loaded; another model has another."""
    half = me.MetaEmbed.from_pretrained(directory, mesh=make_mesh(2, 2, 2), max_visual_tokens=9)
    assert half.fingerprint == model.fingerprint
    assert me.MetaEmbed.from_pretrained(directory, mesh=ONE, seed=1).fingerprint != model.fingerprint
    index = me.Index.build(model.encode_query(["a"]), mesh=ONE)
    with pytest.raises(me.UserError, match="does not record their model"):
        index.check_model(model)


def test_bad_jobs_are_refused(model, table, tmp_path):
    documents = me.open_documents(table)
    wrong = ({"budget": 65}, "1 to 64 document"), ({"budget": 0}, "1 to 64"), ({"dtype": "int4"}, "dtype='int4'")
    for options, message in wrong:
        with pytest.raises(me.UserError, match=message):
            me.index_documents(model, documents, tmp_path / "index", **options)
    with table.open("a") as file:
        file.write(json.dumps({"id": "last", "image": "none.png"}) + "\n")
    with pytest.raises(me.UserError, match="row 10: .*none.png is missing"):
        me.index_documents(model, me.open_documents(table), tmp_path / "index")


def run(monkeypatch, capsys, *arguments) -> str:
    """Run a command, and return its output and its error."""
    monkeypatch.setattr(sys, "argv", ["metaembed_jax", *map(str, arguments)])
    try:
        run_main(cli.main)
    except SystemExit as stopped:
        assert stopped.code == 2
    output = capsys.readouterr()
    return output.out + "".join(line for line in output.err.splitlines() if line.startswith("error: "))


def test_commands(directory, table, tmp_path, monkeypatch, capsys):
    load = functools.cache(functools.partial(me.MetaEmbed.from_pretrained, mesh=ONE))  # a model is loaded once, not by each command
    meshes = []
    monkeypatch.setattr(me.MetaEmbed, "from_pretrained", lambda name, mesh: (meshes.append(mesh), load(name))[1])
    flags = f"--model={directory}", f"--input={table}", f"--out={tmp_path / 'index'}", "--budget=16"
    with table.open("a") as file:
        file.write(json.dumps({"id": "bad", "image": "none.png"}) + "\n")
    assert "error: " in (output := run(monkeypatch, capsys, "index", *flags)) and "none.png is missing; --skip=1" in output
    output = run(monkeypatch, capsys, "index", *flags, "--skip=1")
    assert "10 items (0 encoded, 10 kept, 0 dropped, 1 left out), 16 vectors each.\n  left out bad: " in output
    assert meshes == [None, None] and "GiB of weights on each device; jax" in output
    run(monkeypatch, capsys, "index", *flags, "--skip=1", "--mesh.fsdp=2")
    assert meshes[-1].shape == {"data": 4, "fsdp": 2, "tensor": 1}
    assert "--mesh (data=-1, fsdp=3, tensor=1) does not fit 8 devices" in run(monkeypatch, capsys, "index", *flags, "--mesh.fsdp=3")
    searched = "search", f"--index={tmp_path / 'index'}"
    lines = run(monkeypatch, capsys, *searched, "text 3", "--budget=2:4").splitlines()
    assert len(lines) == 10 and lines[0].split()[0] == "1"
    shown = next(line for line in lines if "row 3" in line)
    assert shown.endswith(r"row 3  text 3 \x1b[1m\u202e")
    lines = run(monkeypatch, capsys, *searched, f"--image={tmp_path / 'a.png'}", "-k", 3, "--budget=1:1:5>4:16").splitlines()
    assert len(lines) == 3
    assert len(run(monkeypatch, capsys, *searched, "text 3", "--budget=1:1:5>4:16").splitlines()) == 5
    for arguments, message in [
        ((), "nothing to search for"),
        (("a", "-k", 11), "k=11: expected 1 to 10"),
        (("a", "--budget=4:17"), "goes beyond the vectors given"),
        (("a", "--budget=1:1,2:2"), "expected one search"),
        (("a", "--budget=x"), "is not a pair"),
        (("a", "--where={page: 3}"), "argument --where: '{page: 3}': expected JSON, such as"),
        (("a", '--where={"page": {"$like": 3}}'), "argument --where: where: 'page': unknown operator '$like'"),
        (("a", '--where={"pgae": 3}'), "no item has the key 'pgae'; known keys: 'path', 'text'"),
        (("a", f"--model={tmp_path / 'none'}"), "no such directory"),
        ((f"--image={tmp_path / 'none.png'}",), "none.png cannot be read"),
    ]:
        assert message in run(monkeypatch, capsys, *searched, *arguments)
    by_hand, vector = me.Index.load(tmp_path / "index", mesh=ONE), np.eye(1, 32, dtype=np.float32)[None]
    by_hand.delete([f"row {n}" for n in range(9)])
    by_hand.add(vector, ["by hand"], metadata=[{"path": None, "page": 3, "text": 7}])
    assert any(line.endswith("by hand  page 3  7") for line in run(monkeypatch, capsys, *searched, "a").splitlines())
    (line,) = run(monkeypatch, capsys, *searched, "a", '--where={"page": {"$gte": 2}}').splitlines()
    assert line.endswith("by hand  page 3  7")
    assert run(monkeypatch, capsys, *searched, "a", '--where={"page": 2}') == "no document matches the filter\n"
    other = write(tmp_path / "other", {key: -x for key, x in random_tensors().items()})
    assert "holds vectors of another model" in run(monkeypatch, capsys, *searched, "a", f"--model={other}")
    me.Index.build(np.eye(32, dtype=np.float32)[None], path=tmp_path / "arrays", mesh=ONE)
    assert "does not record its model" in run(monkeypatch, capsys, "search", f"--index={tmp_path / 'arrays'}", "a")
    assert "is not an index" in run(monkeypatch, capsys, "search", f"--index={tmp_path}", "a")
