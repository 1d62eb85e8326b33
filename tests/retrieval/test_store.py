"""Indexes on disk: crashes, several writers and readers, damage."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import time
import zlib

import jax
import numpy as np
import pytest

import metaembed_jax as me
from metaembed_jax.mesh import make_mesh
from metaembed_jax.retrieval import manifest as manifests
from metaembed_jax.retrieval import store
from tests.retrieval import endless_writer
from tests.retrieval.reference import unit

ONE = make_mesh(devices=jax.devices()[:1])
KILLS = 20
NAN = 0x7FC0  # as bfloat16
CALIBRATION = dataclasses.asdict(manifests.Calibration((1, 1), (4, 9), 10, 0.99, 0.95, 12, 299, 20))


@pytest.fixture
def folder(tmp_path):
    """Return the folder of an index of two segments, with a deleted item."""
    rng = np.random.default_rng(0)
    index = me.Index.build(unit(rng, 20, 9, 8), path=tmp_path / "index", metadata=[{"page": n} for n in range(20)], mesh=ONE)
    index.add([unit(rng, 2, 8)], ["äß 20"])
    index.delete(["4"])
    return index.folder


def all_ids(index) -> tuple[str, ...]:
    return tuple(item for segment in index._segments for item in segment.ids(np.flatnonzero(segment.is_alive)))


def test_killed_at_twenty_random_moments(tmp_path):
    states, seen = endless_writer.states(), set()
    query = endless_writer.vectors(5, 2)
    context = multiprocessing.get_context("forkserver")  # it imports once, and has no threads of JAX
    context.set_forkserver_preload([endless_writer.__name__])
    for moment in np.random.default_rng(0).uniform(0, 0.3, KILLS):
        is_built = context.Event()
        process = context.Process(target=endless_writer.write_forever, args=(tmp_path / "index", is_built))
        process.start()
        assert is_built.wait(60)
        time.sleep(moment)
        process.kill()
        process.join()
        index = me.Index.load(tmp_path / "index", mesh=ONE)
        index.verify()
        ids = all_ids(index)
        assert ids in states
        seen.add(ids)
        assert len(set(index.search(query, len(ids))[1][0].tolist())) == len(ids)
    index.compact()  # a writer removes what the killed ones left
    manifest = store.read_manifest(index.folder)
    assert {path.name for path in index.folder.iterdir()} == {"lock", "manifest.json", manifest.segments[0].name}
    assert len(seen) > 1


def test_readers_keep_working_while_the_index_is_replaced(folder):
    rng = np.random.default_rng(1)
    reader, query = me.Index.load(folder, mesh=ONE), unit(rng, 3, 4, 8)
    before = reader.search(query, 5)[1].tolist()
    me.Index.build(unit(rng, 7, 2, 8), path=folder, mesh=ONE)
    assert reader.search(query, 5)[1].tolist() == before and reader.search(query, 20, (4, 7))[0].shape == (3, 20)
    reader.verify()
    assert len(reader) == 20 and len(me.Index.load(folder, mesh=ONE)) == 7


def test_an_index_that_is_replaced_while_it_is_opened(folder, monkeypatch):
    opened = store.SegmentFiles

    def replace_first(*arguments):
        monkeypatch.setattr(store, "SegmentFiles", opened)
        me.Index.build(unit(np.random.default_rng(0), 3, 1, 8), path=folder, mesh=ONE)
        return opened(*arguments)

    monkeypatch.setattr(store, "SegmentFiles", replace_first)
    assert len(me.Index.load(folder, mesh=ONE)) == 3


def test_one_writer_at_a_time(folder):
    index = me.Index.load(folder, mesh=ONE)
    with store.writing(folder):
        for change in (lambda: index.delete(["1"]), index.compact, lambda: me.Index.build(np.eye(4)[None], path=folder)):
            with pytest.raises(me.UserError, match="is being written by another process"):
                change()
    index.delete(["1"])


def test_a_change_is_made_to_the_newest_index(folder):
    first, second = (me.Index.load(folder, mesh=ONE) for _ in range(2))
    first.delete(["7"])
    second.delete(["8"])
    assert len(second) == len(me.Index.load(folder, mesh=ONE)) == 18 and len(first) == 19
    with pytest.raises(me.UserError, match="has no item '7'"):
        second.delete(["7"])


def test_the_process_may_go_elsewhere(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    index = me.Index.load("index", mesh=ONE)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    index.delete(["1"])
    assert len(me.Index.load(folder, mesh=ONE)) == 19 and not list((tmp_path / "empty").iterdir())


def test_a_failed_change_leaves_nothing(folder):
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    index = me.Index.load(folder, mesh=ONE)
    with pytest.raises(me.UserError, match="length"):
        index.add(iter([(["a"], np.eye(8)[None]), (["b"], 2 * np.eye(8)[None])]))
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before


def test_a_full_disk_leaves_nothing(folder, tmp_path):
    """Files that may not grow beyond some bytes fail as those of a full disk do."""
    vectors, ids = unit(np.random.default_rng(0), 2000, 9, 8), [f"new {n}" for n in range(2000)]
    index, large = me.Index.load(folder, mesh=ONE), me.Index.build(vectors, ids, mesh=ONE)
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    changes = (
        lambda: index.add(vectors, ids),
        lambda: me.Index.build(vectors, ids, path=folder, mesh=ONE),
        lambda: large.save(folder),
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for change in changes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            with pytest.raises(me.UserError, match="cannot write .*/index/.*File too large; free space"):
                change()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before
    assert len(me.Index.load(folder, mesh=ONE)) == 20


def test_saving_and_loading(folder, tmp_path):
    rng = np.random.default_rng(2)
    index, query = me.Index.load(folder, mesh=ONE), unit(rng, 3, 4, 8)
    for _ in range(2):  # the second replaces the first
        index.save(tmp_path / "copy")
        copy = me.Index.load(tmp_path / "copy", mesh=ONE)
        copy.verify()
        for expected, copied in zip(index.search(query, 20), copy.search(query, 20), strict=True):
            np.testing.assert_array_equal(copied, expected)
        assert copy.metadata("3") == {"page": 3} and copy.metadata("äß 20") == {}
    index.save(folder)
    assert len(me.Index.load(folder, mesh=ONE)) == 20
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(me.UserError, match="exists and is not an index"):
        index.save(tmp_path / "other")


def test_any_flipped_byte_is_found(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock" and path.stat().st_size]
    assert len(files) == 2 * (4 + 1 + 3 + 2 + 1 + 1 + 1) + 1 + 1  # the second segment has no columns
    rng = np.random.default_rng(3)
    for file in files:
        content = file.read_bytes()
        offset = int(rng.integers(len(content)))
        file.write_bytes(content[:offset] + bytes([content[offset] ^ 1 << int(rng.integers(8))]) + content[offset + 1 :])
        with pytest.raises(me.UserError) as error:
            me.Index.load(folder, mesh=ONE).verify()
        assert str(file) in str(error.value)
        file.write_bytes(content)
    me.Index.load(folder, mesh=ONE).verify()


def test_a_search_meets_the_damage_that_it_reads(folder):
    query = unit(np.random.default_rng(4), 1, 4, 8)
    for name in ("vectors-0-1", "vectors-8-9", "counts", "ids", "id-ends"):
        file = next(folder.glob(f"*/{name}"))
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(me.UserError, match=f"{name} is damaged"):
            me.Index.load(folder, mesh=ONE).search(query, 20)
        file.write_bytes(content)


def rewrite(folder, **changes):
    """Change the manifest, with a checksum that matches."""
    path = folder / "manifest.json"
    index = json.loads(path.read_text())["index"]
    index = index | changes
    path.write_text(json.dumps({"sha256": manifests._digest(index), "index": index}))


def test_invalid_manifests(folder, tmp_path):
    content = (folder / "manifest.json").read_text()
    segment = json.loads(content)["index"]["segments"][0]
    sizes = segment["sizes"]
    for changes, message in [
        ({"format": 1}, "another version"),
        ({"width": 16}, "another size than its items have"),
        ({"width": -1}, "is not valid"),
        ({"width": 8.0}, "is not valid"),
        ({"dtype": "object"}, "is not valid"),
        ({"levels": [4, 1]}, "is not valid"),
        ({"levels": []}, "is not valid"),
        ({"levels": [1, 4, 8, 10]}, "names other files"),
        ({"model": "me"}, "is not valid"),
        ({"left_out": [["a.png", "broken"]]}, "is not valid"),
        ({"left_out": [["a.png", "broken", -1]]}, "is not valid"),
        ({"left_out": [["a.png", None, 1]]}, "is not valid"),
        ({"exact": "float32"}, "is not valid"),
        ({"dtype": "int8", "exact": "int8"}, "is not valid"),
        ({"dtype": "int8", "exact": "float32"}, "names other files"),
        ({"calibrations": None}, "is not valid"),
        ({"calibrations": [{"first": [1, 1]}]}, "is not valid"),
        ({"calibrations": [CALIBRATION | {"coverage": 1.0}]}, "is not valid"),
        ({"calibrations": [CALIBRATION | {"first": [1]}]}, "is not valid"),
        ({"calibrations": [CALIBRATION | {"survivors": 9}]}, "is not valid"),
        ({"more": 1}, "is not valid"),
        ({"segments": [segment, segment]}, "is not valid"),
        ({"segments": [segment | {"name": "../../other"}]}, "is not valid"),
        ({"segments": [segment | {"name": "0123456789abcdef"}]}, "is missing"),
        ({"segments": [segment | {"items": 21}]}, "another size than its items have"),
        ({"segments": [segment | {"items": 0}]}, "is not valid"),
        ({"segments": [segment | {"deleted": [20]}]}, "is not valid"),
        ({"segments": [segment | {"deleted": [3, 2]}]}, "is not valid"),
        ({"segments": [segment | {"sizes": sizes | {"ids": 10**15}}]}, "has .* bytes, expected|damaged"),
        ({"segments": [segment | {"sizes": sizes | {"../x": 1}}]}, "names other files"),
        ({"segments": 3}, "is not valid"),
    ]:
        rewrite(folder, **changes)
        with pytest.raises(me.UserError, match=message):
            me.Index.load(folder, mesh=ONE)
        (folder / "manifest.json").write_text(content)
    lists = json.dumps({"sha256": manifests._digest([]), "index": []})
    for broken in ("", "[]", "{}", content[:-40], content.replace("20", "21"), "[" * 10**5, lists):
        (folder / "manifest.json").write_text(broken)
        with pytest.raises(me.UserError, match="manifest.json is damaged"):
            me.Index.load(folder, mesh=ONE)
    with pytest.raises(me.UserError, match="is not an index"):
        me.Index.load(tmp_path / "nowhere", mesh=ONE)
    with pytest.raises(me.UserError, match="^5: expected a path"):
        me.Index.load(5)  # pyright: ignore[reportArgumentType]


def test_a_removed_folder_is_not_created_again(tmp_path):
    index = me.Index.build(np.eye(4, dtype=np.float32)[None].repeat(2, 0), path=tmp_path / "index", mesh=ONE)
    shutil.rmtree(tmp_path / "index")
    with pytest.raises(me.UserError, match="is not an index"):
        index.add(np.eye(4, dtype=np.float32)[None].repeat(2, 0), ["c", "d"])
    assert not (tmp_path / "index").exists()


def test_links_are_not_followed(folder, tmp_path):
    file = next(folder.glob("*/vectors-0-1"))
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(me.UserError, match="vectors-0-1 cannot be read"):
        me.Index.load(folder, mesh=ONE)
    file.unlink()
    shutil.move(tmp_path / "elsewhere", file)
    shutil.move(file.parent, tmp_path / "segment")
    file.parent.symlink_to(tmp_path / "segment")
    with pytest.raises(me.UserError, match="is a link"):
        me.Index.load(folder, mesh=ONE)


@pytest.mark.parametrize("name", ["manifest.json", "vectors-0-1", "checksums"])
def test_pipes_folders_and_links_are_not_read(folder, name):
    """Reading a pipe or a device would not end."""
    file = next(folder.rglob(name))
    for make in (os.mkfifo, os.mkdir, lambda file: os.symlink("/dev/zero", file), lambda file: os.symlink(file, file)):
        file.unlink() if file.is_file() or file.is_symlink() or file.is_fifo() else file.rmdir()
        make(file)
        with pytest.raises(me.UserError, match=f"{name} cannot be read"):
            me.Index.load(folder, mesh=ONE)


def test_the_lock_is_not_followed(folder, tmp_path):
    index = me.Index.load(folder, mesh=ONE)
    for make in (os.mkfifo, lambda file: os.symlink(tmp_path / "elsewhere", file)):
        (folder / "lock").unlink()
        make(folder / "lock")
        with pytest.raises(me.UserError, match="lock cannot be written"):
            index.delete(["1"])
    assert not (tmp_path / "elsewhere").exists()


def test_only_segments_are_removed(folder, tmp_path):
    (folder / "0123456789abcdef").touch()
    (folder / ".manifest.json.1.part").mkdir()
    me.Index.load(folder, mesh=ONE).compact()
    assert (folder / "0123456789abcdef").is_file() and (folder / ".manifest.json.1.part").is_dir()
    other = tmp_path / "other" / "fedcba9876543210"
    other.mkdir(parents=True)
    for name in ("lock", "notes.txt"):
        (tmp_path / "other" / name).touch()
    with pytest.raises(me.UserError, match="other exists and is not an index"):
        me.Index.build(unit(np.random.default_rng(0), 1, 1, 8), path=tmp_path / "other", mesh=ONE)
    assert other.is_dir()


def test_a_folder_without_its_first_manifest_is_built_again(folder):
    (folder / "manifest.json").rename(folder / ".manifest.json.1.part")
    index = me.Index.build(unit(np.random.default_rng(0), 3, 1, 8), path=folder, mesh=ONE)
    assert len(index) == 3 and len(list(folder.iterdir())) == 3


def refile(folder, name, content):
    """Replace a file of the first segment, with checksums that match."""
    path = folder / "manifest.json"
    index = json.loads(path.read_text())["index"]
    segment = index["segments"][0]
    (folder / segment["name"] / name).write_bytes(content)
    segment["sizes"][name] = len(content)
    contents = [(folder / segment["name"] / file).read_bytes() for file in sorted(segment["sizes"])]
    crcs = np.array([zlib.crc32(content) for content in contents if content], np.uint32).tobytes()  # each is one chunk
    (folder / segment["name"] / "checksums").write_bytes(crcs)
    segment["checksums"] = hashlib.sha256(crcs).hexdigest()
    rewrite(folder, **index)


@pytest.mark.parametrize("name, number", [("counts", np.zeros(20, np.int32)), ("vectors-0-1", np.full((20, 8), NAN, np.uint16))])
def test_invalid_vectors_are_not_searched(folder, name, number):
    refile(folder, name, number.tobytes())
    index = me.Index.load(folder, mesh=ONE)
    query = unit(np.random.default_rng(0), 2, 4, 8)
    for search in (
        lambda: index.search(query, 3),
        lambda: index.calibrate(query, (1, 1), (4, 9), k=3, coverage=0.1, confidence=0.1),
    ):
        with pytest.raises(me.UserError, match="no vectors|has NaN or infinities near byte 0"):
            search()


def test_wrong_counts_are_not_copied(folder):
    refile(folder, "counts", np.zeros(20, np.int32).tobytes())
    with pytest.raises(me.UserError, match="counts: an item has fewer vectors"):
        me.Index.load(folder, mesh=ONE).compact()
    assert len(me.Index.load(folder, mesh=ONE)) == 20


def test_invalid_metadata(folder):
    for content in (b"5" * 20, b"[" * 50_000):
        refile(folder, "metadata", content)
        refile(folder, "metadata-ends", np.linspace(0, len(content), 21, dtype=np.int64)[1:].tobytes())
        with pytest.raises(me.UserError, match="metadata, item 3: .*expected a JSON object"):
            me.Index.load(folder, mesh=ONE).metadata("3")


def test_a_model_whose_path_is_not_text(folder):
    """A file's name may be any bytes."""
    rewrite(folder, model={"name": os.fsdecode(b"/models/\xff"), "fingerprint": "f"})
    index = me.Index.load(folder, mesh=ONE)
    index.compact()
    assert os.fsencode(index.model) == b"/models/\xff"


def test_paths_that_cannot_be_written(folder, tmp_path):
    for path in (tmp_path / ("x" * 300), folder / "manifest.json" / "index"):
        with pytest.raises(me.UserError, match="cannot be written"):
            me.Index.load(folder, mesh=ONE).save(path)
        with pytest.raises(me.UserError, match="cannot be read"):
            me.Index.load(path, mesh=ONE)


def test_a_file_that_is_cut(folder):
    file = next(folder.glob("*/vectors-1-4"))
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(me.UserError, match="vectors-1-4 is damaged: it has"):
        me.Index.load(folder, mesh=ONE)


def test_a_temporary_index_is_removed_with_its_last_user():
    index = me.Index.build(unit(np.random.default_rng(0), 3, 1, 8), mesh=ONE)
    folder = index.folder
    assert folder.is_dir()
    del index
    assert not folder.exists()


@pytest.mark.parametrize(
    "files", [("manifest.json", "index.html"), ("draft.json", "0123456789abcdef/precious"), ("lock", "manifest.json")]
)
def test_folders_of_other_programs_are_not_taken_for_indexes(tmp_path, files):
    for name in files:
        (tmp_path / "web" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "web" / name).write_text('{"name": "an app"}')
    with pytest.raises(me.UserError, match="web exists and is not an index; choose another folder"):
        me.Index.build(np.ones((1, 1, 1), np.float32), path=tmp_path / "web")
    assert {str(path.relative_to(tmp_path / "web")) for path in (tmp_path / "web").rglob("*") if path.is_file()} == {*files}
