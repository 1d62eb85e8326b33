"""Preparation of a source that is prepared already, or was killed, after rows or the images that they name changed."""

import json
import os
import shutil

import numpy as np
import pytest

from metaembed_jax.data import sources
from metaembed_jax.data.sources import preparation, records, shards, splits
from tests.data.field_files import inline, picture, tevatron_queries, write_mmeb, write_pairs, write_parquet, write_tevatron

ROWS, IN_SHARD = 120, 10


@pytest.fixture
def written(monkeypatch):
    """The shards that were written, of `IN_SHARD` rows each."""
    monkeypatch.setattr(shards, "SHARD_ROWS", IN_SHARD)
    numbers = []

    def write(job, shard, original=shards.write_shard):
        numbers.append(shard)
        return original(job, shard)

    monkeypatch.setattr(shards, "write_shard", write)
    return numbers


def rows_of(count):
    return [
        {"query": f"a {n}", "positive": f"b {n}"} | ({"positive_image": f"{n}.png"} if n % 3 == 0 else {}) for n in range(count)
    ]


def write_all(folder, rows):
    write_pairs(folder / "mine.jsonl", rows)
    for row in rows:
        name = row.get("positive_image")
        if name and not (folder / name).exists():
            (folder / name).write_bytes(picture(int(name.partition(".")[0]), "png", 28, 28))


def prepare(folder, out, kind="pairs", skips=0):
    (marker,) = sources.prepare_from(kind, folder, out, 0, skips).values()
    return marker


def content(out, name="mine"):
    """The records and descriptions of all splits, and the bytes of their files."""
    folder = out / name / preparation.VERSION
    splits_of = records.open_splits(out / name, preparation.VERSION)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith(("pairs-", "described-"))}
    return [list(split) for split in splits_of], files


def test_a_picture_replaced_under_its_name_is_prepared_again(tmp_path, written, capsys):
    write_all(tmp_path / "in", rows_of(ROWS))
    file, out = tmp_path / "in/mine.jsonl", tmp_path / "out"
    first = prepare(file, out)
    assert written == list(range(12)) and first["images"] == 40 and first["left_out"] == []
    written.clear()
    assert prepare(file, out) == first and written == [] and "changed" not in capsys.readouterr().out
    os.utime(file)  # touched, with the same rows
    touched = prepare(file, out)
    assert written == [] and touched["inputs"] != first["inputs"] and touched["fingerprint"] == first["fingerprint"]

    before = (tmp_path / "in/36.png").stat()
    (tmp_path / "in/36.png").write_bytes(picture(1036, "png", 28, 28))
    os.utime(tmp_path / "in/36.png", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    marker = prepare(file, out)
    assert written == [3] and marker["fingerprint"] != first["fingerprint"]
    printed = capsys.readouterr().out
    assert f"{out}/mine: 1 row changed since it was prepared (values or images), from {file}, row 36 on\n" in printed
    assert f"{out}/mine: 11 of 12 shards are kept\n" in printed
    fresh = prepare(file, tmp_path / "fresh")
    assert fresh == marker and content(tmp_path / "fresh") == content(out)


@pytest.mark.parametrize(
    "change, most",
    [
        (lambda rows: rows[:50] + [{"query": "new", "positive": "row"}] + rows[51:], 1),
        (lambda rows: rows + [{"query": f"new {n}", "positive": "row"} for n in range(7)], 3),
        (lambda rows: rows[:-15], 4),
        (lambda rows: [{"query": "first", "positive": "row"}, *rows], 13),
    ],
)
def test_a_changed_table_keeps_the_shards_that_are_the_same(tmp_path, written, change, most, capsys):
    rows = rows_of(ROWS)
    write_all(tmp_path / "in", rows)
    file, out = tmp_path / "in/mine.jsonl", tmp_path / "out"
    prepare(file, out)
    written.clear()
    write_pairs(file, change(rows))
    marker = prepare(file, out)
    assert 0 < len(written) <= most and "changed since it was prepared (values or images)" in capsys.readouterr().out
    fresh = prepare(file, tmp_path / "fresh")
    assert fresh == marker and content(tmp_path / "fresh") == content(out)


def test_a_killed_preparation_keeps_its_shards_when_rows_change(tmp_path, written, monkeypatch):
    rows = rows_of(ROWS)
    write_all(tmp_path / "in", rows)
    file, out = tmp_path / "in/mine.jsonl", tmp_path / "out"

    def killed_at(shard, function=shards.write_shard):
        def write(job, number):
            if number == shard:
                raise KeyboardInterrupt
            return function(job, number)

        return write

    for again, shard in enumerate((5, 9)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(shards, "write_shard", killed_at(shard))
            prepare(file, out)
        write_pairs(file, [{"query": f"other {again}", "positive": "row"}, *rows[1:]])
    written.clear()
    marker = prepare(file, out)
    assert written == [0, 9, 10, 11]
    assert prepare(file, tmp_path / "fresh") == marker and content(tmp_path / "fresh") == content(out)


def test_a_kill_while_the_shards_move_loses_none(tmp_path, written, monkeypatch):
    write_all(tmp_path / "in", rows_of(ROWS))
    file, out = tmp_path / "in/mine.jsonl", tmp_path / "out"
    fresh = prepare(file, tmp_path / "fresh")
    written.clear()
    for kill_at in (1, 8, 33, 37):  # 36 records move, and then the folder
        moves = []

        def replace(source, target, original=os.replace, kill_at=kill_at, moves=moves):
            if str(target).endswith(preparation.VERSION) or "-of-" in os.path.basename(target):
                moves.append(target)
                if len(moves) == kill_at:
                    raise KeyboardInterrupt
            return original(source, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(preparation.os, "replace", replace)
            prepare(file, out)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(records, "write_marker", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(file, out)
    assert prepare(file, out) == fresh and written == list(range(12)) and content(out) == content(tmp_path / "fresh")


def test_left_out_rows_are_listed_and_tried_again_when_they_change(tmp_path, written, capsys):
    rows = rows_of(30)
    write_all(tmp_path / "in", rows)
    file, out = tmp_path / "in/mine.jsonl", tmp_path / "out"
    (tmp_path / "in/3.png").unlink()
    lines = file.read_text().splitlines(keepends=True)
    lines[17] = '{"query": "cut off\n'
    file.write_text("".join(lines))
    with pytest.raises(sources.UserError, match="row 3: positive_image: the image .*3.png is missing; --skip=N leaves out"):
        prepare(file, out)
    marker = prepare(file, out, skips=2)
    (missing, reason), (cut, why) = marker["left_out"]
    assert missing == f"{file}, row 3" and "is missing" in reason and cut == f"{file}, row 17" and "row 17 is not JSON" in why
    assert sum(marker["rows"].values()) == 28 and f"left out: {file}, row 17 is not JSON" in capsys.readouterr().out
    assert json.loads((out / "mine" / preparation.VERSION / "prepared.json").read_text())["left_out"] == marker["left_out"]
    written.clear()
    assert prepare(file, out, skips=2) == marker and written == []
    (tmp_path / "in/3.png").write_bytes(picture(3, "png", 28, 28))
    marker = prepare(file, out, skips=1)
    assert [row for row, _ in marker["left_out"]] == [cut] and 0 in written


def test_rows_left_out_before_are_refused_where_they_are_too_many(tmp_path, written, capsys):
    rows = rows_of(30)
    write_all(tmp_path / "in", rows)
    file, out = tmp_path / "in/mine.jsonl", tmp_path / "out"
    (tmp_path / "in/3.png").write_bytes(b"broken")
    marker = prepare(file, out, skips=1)
    printed = capsys.readouterr().out
    for touched in (False, True):
        if touched:
            os.utime(file)
        with pytest.raises(sources.UserError, match=f"^{file}, row 3: .*; --skip=N leaves out N bad rows$"):
            prepare(file, out)
        again = prepare(file, out, skips=1)
        assert again["left_out"] == marker["left_out"] and again["fingerprint"] == marker["fingerprint"]
        assert f"left out: {file}, row 3: " in printed and capsys.readouterr().out == printed

    # The same where nothing but texts is read, which is known from the files' times alone.
    write_pairs(file, [{"query": f"a {n}", "positive": f"b {n}" if n != 7 else ""} for n in range(30)])
    prepare(file, out, skips=1)
    with pytest.raises(sources.UserError, match=f"^{file}, row 7: positive has neither"):
        prepare(file, out)


@pytest.mark.parametrize("killed", [False, True])
def test_shards_of_an_unfinished_preparation_are_not_the_complete_source(tmp_path, written, monkeypatch, capsys, killed):
    write_all(tmp_path / "in", rows_of(30))
    file, out = tmp_path / "in/mine.jsonl", tmp_path / "out"
    first = prepare(file, out)
    for number in (0, 6, 21):
        (tmp_path / f"in/{number}.png").write_bytes(b"broken" if number != 6 else picture(1006, "png", 28, 28))
    os.utime(tmp_path / "in/6.png", ns=(0, 0))
    if killed:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(preparation, "_join", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
            prepare(file, out, skips=2)
    for _ in range(2):  # each shard has one bad row or none, so all of them are written
        with pytest.raises(sources.UserError, match=r"row 0: .* \(and 1 more so far; --skip allows 1\)"):
            prepare(file, out, skips=1)
    assert records.read_marker(out / "mine", preparation.VERSION) == first
    capsys.readouterr()
    written.clear()
    marker = prepare(file, out, skips=2)
    assert f"{out}/mine: 3 rows changed since it was prepared" in capsys.readouterr().out and written == []
    assert len(marker["left_out"]) == 2 and not (out / "mine" / f"{preparation.VERSION}.part").exists()
    fresh = prepare(file, tmp_path / "fresh", skips=2)
    assert fresh == marker and content(tmp_path / "fresh") == content(out)


def test_pictures_put_back_end_an_unfinished_preparation(tmp_path, written):
    write_all(tmp_path / "in", rows_of(30))
    file, out, image = tmp_path / "in/mine.jsonl", tmp_path / "out", tmp_path / "in/3.png"
    first, before, times = prepare(file, out), image.read_bytes(), image.stat()
    image.write_bytes(b"broken")
    with pytest.raises(sources.UserError, match="row 3: "):
        prepare(file, out)
    image.write_bytes(before)
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert prepare(file, out) == first and not (out / "mine" / f"{preparation.VERSION}.part").exists()


@pytest.mark.parametrize("damaged", ["", "{", "[]", "{}"])
def test_a_damaged_marker_is_written_again(tmp_path, written, capsys, damaged):
    write_all(tmp_path / "in", rows_of(30))
    file, out = tmp_path / "in/mine.jsonl", tmp_path / "out"
    first, marker = prepare(file, out), out / "mine" / preparation.VERSION / "prepared.json"
    marker.write_text(damaged)
    with pytest.raises(sources.UserError, match="holds no complete preparation"):
        sources.prepare("mine", out)
    written.clear()
    capsys.readouterr()
    assert prepare(file, out) == first and written == []
    assert capsys.readouterr().out == f"{marker} is damaged; the source is prepared again\n"
    assert prepare(file, out) == first and capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["precious.json", "a folder/x", None])
def test_a_folder_of_other_files_is_not_replaced(tmp_path, written, name):
    write_all(tmp_path / "in", rows_of(30))
    folder = tmp_path / "out/mine" / preparation.VERSION
    file = folder / name if name else folder
    file.parent.mkdir(parents=True)
    file.write_text("kept")
    for _ in range(2):
        with pytest.raises(sources.UserError, match=f"^{folder} exists and is not a prepared source; choose another --out"):
            prepare(tmp_path / "in/mine.jsonl", tmp_path / "out")
    assert file.read_text() == "kept" and written == []


def test_images_in_archives_and_of_a_corpus_are_noticed(tmp_path, written):
    write_mmeb(tmp_path / "mmeb", "X", 20, "vqa", zipped=True)
    prepare(tmp_path / "mmeb", tmp_path / "out", "mmeb")
    written.clear()
    shutil.rmtree(tmp_path / "mmeb/images_zip")
    write_mmeb(tmp_path / "mmeb", "X", 20, "vqa", zipped=True)
    prepare(tmp_path / "mmeb", tmp_path / "out", "mmeb")
    assert written == []
    (tmp_path / "mmeb/images/X/Train").mkdir(parents=True)
    (tmp_path / "mmeb/images/X/Train/12.jpg").write_bytes(picture(99))  # files come before archives
    prepare(tmp_path / "mmeb", tmp_path / "out", "mmeb")
    assert written == [1]

    documents = [{"docid": str(n), "image": {"bytes": None, "path": f"{n}.png"}, "text": None} for n in range(20)]
    documents[7] = {"docid": "7", "image": inline(picture(7)), "text": None}
    for n in range(20):
        (tmp_path / "pages/corpus").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"pages/corpus/{n}.png").write_bytes(picture(n, "png"))
    write_parquet(tmp_path / "pages/corpus/c.parquet", documents)
    write_parquet(tmp_path / "pages/queries/q.parquet", tevatron_queries(20))
    first = prepare(tmp_path / "pages", tmp_path / "out", "tevatron")
    assert first["images"] == 19
    written.clear()
    assert prepare(tmp_path / "pages", tmp_path / "out", "tevatron") == first and written == []
    (tmp_path / "pages/corpus/3.png").write_bytes(picture(55, "png"))
    assert prepare(tmp_path / "pages", tmp_path / "out", "tevatron")["fingerprint"] != first["fingerprint"] and written == [0, 1]


def test_a_changed_query_of_a_corpus_keeps_the_other_shards(tmp_path, written):
    queries = tevatron_queries(30)
    corpus = [{"docid": str(n), "image": inline(picture(n)), "text": None} for n in range(30)]
    write_tevatron(tmp_path / "pages", queries, corpus)
    prepare(tmp_path / "pages", tmp_path / "out", "tevatron")
    written.clear()
    queries[25]["query_text"] = "another"
    write_tevatron(tmp_path / "pages", queries, corpus)
    for file in (tmp_path / "pages/corpus/data").iterdir():
        os.utime(file, ns=(0, 0))
    prepare(tmp_path / "pages", tmp_path / "out", "tevatron")
    assert written == [0, 1, 2]  # the corpus was written again
    queries[5]["query_text"] = "another"
    write_parquet(tmp_path / "pages/queries/train-00000-of-00001.parquet", queries, 3)
    written.clear()
    prepare(tmp_path / "pages", tmp_path / "out", "tevatron")
    assert written == [0]


def test_rows_that_are_added_leave_most_splits_as_they_are():
    before, after = (splits.held_out(np.arange(rows)) for rows in (10_000, 10_100))
    assert len(before) == len(after) == 512 and sum(after.get(row) == split for row, split in before.items()) > 500
