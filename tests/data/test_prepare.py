"""Preparation of sources from every format: killed and resumed, and read from any row."""

import dataclasses
import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from metaembed_jax import cli
from metaembed_jax.config import DataConfig
from metaembed_jax.data import sources
from metaembed_jax.data.sources import image_files, preparation, records, row_files, shards, splits
from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.metrics import evaluate
from metaembed_jax.files import locked
from tests.data.field_files import (
    MARK,
    inline,
    mmeb_rows,
    picture,
    write_colpali,
    write_mmeb,
    write_pairs,
    write_parquet,
)


def read(out, name, split="train"):
    return list(records.open_split(out / name, preparation.VERSION, split))


def prepare(kind, path, out, skips=0, workers=0):
    return sources.prepare_from(kind, path, out, workers, skips)


@pytest.mark.parametrize("zipped", [False, True])
def test_mmeb(tmp_path, zipped):
    write_mmeb(tmp_path / "in", "MSCOCO_t2i", 3, "t2i", zipped=zipped)
    write_mmeb(tmp_path / "in", "A-OKVQA", 3, "vqa", zipped=zipped)
    markers = prepare("mmeb", tmp_path / "in", tmp_path / "out")
    assert set(markers) == {"MSCOCO_t2i", "A-OKVQA"}
    for number, record in enumerate(read(tmp_path / "out", "MSCOCO_t2i")):
        image = picture(number)
        assert record == {
            "query": {"text": f"Find: caption {number}\n"},
            "positive": {"text": "Represent the image.\n", "image": image},
            "negatives": [],
            "source": "MSCOCO_t2i",
        }
    for number, record in enumerate(read(tmp_path / "out", "A-OKVQA")):
        assert record["query"] == {"text": f"Answer: question {number}?\n", "image": picture(number)}
        assert record["positive"] == {"text": f"answer {number}"} and record["negatives"] == [{"text": f"answer {number + 1}"}]
    assert markers["A-OKVQA"]["queries"] == {"text": 0, "image": 0, "image and text": 3}
    assert markers["A-OKVQA"]["positives"]["text"] == markers["A-OKVQA"]["negatives"] == 3


def test_other_splits_and_lists_of_negatives(tmp_path):
    rows = mmeb_rows("CIRR", 2, "vqa")
    for row in rows:
        row["neg_text"], row["neg_image_path"] = ["no", f"{MARK} or this"], ["", "images/CIRR/Train/1.jpg"]
    write_mmeb(tmp_path, "CIRR", 2, "vqa")
    write_parquet(tmp_path / "CIRR" / "diverse_instruction-00000-of-00001.parquet", rows)
    prepare("mmeb_diverse", tmp_path, tmp_path / "out")
    assert read(tmp_path / "out", "CIRR")[1]["negatives"] == [{"text": "no"}, {"text": " or this".lstrip(), "image": picture(1)}]


def test_mined_with_images_inline(tmp_path):
    row = {"qry": "red", "qry_image": None, "pos_text": f"{MARK}\nthis", "pos_image": inline(picture(1))}
    row |= {"neg_text": [MARK, "words alone"], "neg_image_0": inline(picture(2)), "neg_image_1": None}
    write_parquet(tmp_path / "in" / "WebQA" / "train.parquet", [row] * 2)
    prepare("mined", tmp_path / "in", tmp_path / "out")
    record = read(tmp_path / "out", "WebQA")[0]
    assert record["positive"] == {"text": "this", "image": picture(1)}
    assert record["negatives"] == [{"image": picture(2)}, {"text": "words alone"}]


def test_colpali(tmp_path):
    write_colpali(tmp_path / "in", 3)
    prepare("colpali", tmp_path / "in", tmp_path / "out")
    record = read(tmp_path / "out", "colpali")[2]
    assert record["query"] == {"text": "which page is 2?"}
    assert record["positive"] == {"image": picture(1002, "png", 112, 84)}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_own_pairs(tmp_path, ending):
    (tmp_path / "a.png").write_bytes(picture(1, "png"))
    rows = [
        {"query": "Grün 🌱", "positive_image": "a.png"},
        {"query_image": "a.png", "query": "x", "positive": "y", "negatives": ["n", ""], "negative_images": ["", "a.png"]},
    ]
    if ending == "jsonl":
        write_pairs(tmp_path / "mine.jsonl", rows)
    else:
        columns = {key for row in rows for key in row}
        write_parquet(tmp_path / "mine.parquet", [{key: row.get(key) for key in columns} for row in rows])
    prepare("pairs", tmp_path / f"mine.{ending}", tmp_path / "out")
    first, second = read(tmp_path / "out", "mine")
    assert first["query"] == {"text": "Grün 🌱"} and first["positive"] == {"image": picture(1, "png")}
    assert second["negatives"] == [{"text": "n"}, {"image": picture(1, "png")}] and second["source"] == "mine"


def test_one_page_of_a_tiff_is_read_and_the_others_are_counted(tmp_path, capsys):
    pages = [Image.new("RGB", (60, 84), colour) for colour in ("red", "lime", "blue")]
    pages[0].save(tmp_path / "fax.tif", save_all=True, append_images=pages[1:])
    rows = [{"query": f"page {number}", "positive_image": "fax.tif"} for number in range(3)]
    write_pairs(tmp_path / "mine.jsonl", rows)
    prepare("pairs", tmp_path / "mine.jsonl", tmp_path / "out")
    assert "mine: 6 pages of TIFFs were not read; of each TIFF, the first page is\n" in capsys.readouterr().out


def test_images_over_the_flag_are_bad_rows_in_every_process(tmp_path, monkeypatch):
    monkeypatch.setenv("METAEMBED_IMAGE_MIB", "512")
    Image.new("L", (600, 600)).save(tmp_path / "large.png")
    write_pairs(tmp_path / "mine.jsonl", [{"query": "large", "positive_image": "large.png"}])
    command = ["prepare", "--source=pairs", f"--from={tmp_path}/mine.jsonl", f"--out={tmp_path}/out", "--workers=1"]
    with pytest.raises(UserError, match="large.png: the image is 600x600 pixels, 2 MiB in memory; expected at most 1 MiB"):
        cli.main([*command, "--image-mib=1"])
    for number in ("0", "x", "-1", "1048576"):
        with pytest.raises(UserError, match="--image-mib: .* expected the MiB of a decoded image"):
            cli.main([*command, f"--image-mib={number}"])
    cli.main([*command, "--image-mib=2"])


def test_held_out_rows_are_a_search_task(tmp_path):
    rows = [{"query": f"q{number}", "positive": f"p{number // 2}"} for number in range(400)]
    write_pairs(tmp_path / "mine.jsonl", rows)
    marker = prepare("pairs", tmp_path / "mine.jsonl", tmp_path)["mine"]
    assert marker["rows"] == {"train": 360, "validation": 20, "test": 20}
    every = {record["query"]["text"] for split in records.SPLITS for record in read(tmp_path, "mine", split)}
    assert every == {row["query"] for row in rows}
    task = sources.retrieval("mine", tmp_path, "test")
    assert len({str(item) for item in task.documents}) == len(task.documents)
    for query, relevant in zip(task.queries, task.relevance, strict=True):
        (document,) = relevant
        assert task.documents[document] == {"text": f"p{int(query['text'][1:]) // 2}"}


def test_rows_that_share_lie_in_one_split(tmp_path):
    """Chains: rows share a query with the next and a positive with the one after it, in groups of 8."""
    rows = [{"query": f"q{number // 2}", "positive": f"p{(number + 1) // 2 + number // 8 * 100}"} for number in range(400)]
    write_pairs(tmp_path / "mine.jsonl", rows)
    marker = prepare("pairs", tmp_path / "mine.jsonl", tmp_path)["mine"]
    assert marker["components"] == 50 and marker["rows"] == {"train": 368, "validation": 16, "test": 16}
    found = [
        {(kind, record[kind]["text"]) for record in read(tmp_path, "mine", split) for kind in ("query", "positive")}
        for split in records.SPLITS
    ]
    assert not found[0] & found[1] and not found[0] & found[2] and not found[1] & found[2]


def test_splits_of_rows_that_share_nothing_are_random_rows():
    order = np.argsort(np.random.default_rng(0).random(400)).tolist()
    expected = {row: "validation" if index < 20 else "test" for index, row in enumerate(order[:40])}
    assert splits.held_out(splits.components_of([(b"%d" % row, b"%d" % row) for row in range(400)])) == expected
    assert splits.held_out(np.arange(19)) == {} == splits.held_out(np.arange(400) % 7)
    eight = splits.held_out(np.arange(400) % 8)
    assert {split: len({row % 8 for row in eight if eight[row] == split}) for split in ("validation", "test")} == {
        "validation": 1,
        "test": 1,
    }
    assert len(eight) == 100


def test_equal_queries_search_all_their_positives():
    texts = [("a", "x"), ("b", "y"), ("a", "y"), ("a", "x"), ("c", "z")]
    task = records.pairs_retrieval([{"query": {"text": query}, "positive": {"text": positive}} for query, positive in texts])
    assert [query["text"] for query in task.queries] == ["a", "b", "c"]
    assert [document["text"] for document in task.documents] == ["x", "y", "z"] and task.relevance == [{0, 1}, {1}, {2}]
    perfect = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]])
    assert evaluate(perfect, task.relevance)["R@1"].tolist() == [1, 1, 1]


def test_shards_resume_and_do_not_depend_on_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ROWS", 16)
    monkeypatch.setattr(row_files, "LINES_PER_OFFSET", 3)
    write_pairs(tmp_path / "mine.jsonl", [{"query": f"q{number}", "positive": "p"} for number in range(100)])
    whole = prepare("pairs", tmp_path / "mine.jsonl", tmp_path / "whole")["mine"]
    written = []

    def killed_at_the_fourth(job, shard, write=shards.write_shard):
        written.append(shard)
        if len(written) == 4:
            raise KeyboardInterrupt
        return write(job, shard)

    monkeypatch.setattr(shards, "write_shard", killed_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        prepare("pairs", tmp_path / "mine.jsonl", tmp_path / "killed")
    with pytest.raises(UserError, match="no complete preparation of a source 'mine'"):
        sources.prepare("mine", tmp_path / "killed")
    again = prepare("pairs", tmp_path / "mine.jsonl", tmp_path / "killed")["mine"]
    assert written == [0, 1, 2, 3, 3, 4, 5, 6] and again == whole
    assert [r["query"]["text"] for r in read(tmp_path / "killed", "mine")] == [
        r["query"]["text"] for r in read(tmp_path / "whole", "mine")
    ]
    assert read(tmp_path / "killed", "mine") == read(tmp_path / "whole", "mine")
    assert prepare("pairs", tmp_path / "mine.jsonl", tmp_path / "killed")["mine"] == whole and len(written) == 8
    write_pairs(tmp_path / "other/mine.jsonl", [{"query": "other", "positive": "p"}])
    with pytest.raises(UserError, match="killed/mine is prepared already, from other files than .*other/mine.jsonl: .*; remove it"):
        prepare("pairs", tmp_path / "other/mine.jsonl", tmp_path / "killed")


def test_json_lines_are_found_by_their_offsets(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "LINES_PER_OFFSET", 3)
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps({"n": "ü" * n}) for n in range(20)) + "\n")
    table = row_files.open_row_files([tmp_path / "a.jsonl"])
    for start in range(20):
        assert [len(row["n"]) for row in table.read(start, 20)] == list(range(start, 20))


def test_workers_write_shards_at_the_same_time(tmp_path):
    rows = [{"query": f"query {number}", "positive": "p" * 500} for number in range(3 * shards.SHARD_ROWS)]
    write_pairs(tmp_path / "mine.jsonl", rows)
    marker = prepare("pairs", tmp_path / "mine.jsonl", tmp_path / "one")
    assert prepare("pairs", tmp_path / "mine.jsonl", tmp_path / "two", workers=3) == marker
    assert read(tmp_path / "one", "mine") == read(tmp_path / "two", "mine")


def test_workers_write_the_same(tmp_path):
    write_mmeb(tmp_path / "in", "CIRR", 30, "it2it")
    marker = prepare("mmeb", tmp_path / "in", tmp_path / "one")
    assert prepare("mmeb", tmp_path / "in", tmp_path / "two", workers=2) == marker
    assert read(tmp_path / "one", "CIRR") == read(tmp_path / "two", "CIRR")


@pytest.mark.parametrize("group", [3, 1000])
def test_tables_read_from_anywhere(tmp_path, group):
    rows = [{"n": number} for number in range(50)]
    write_parquet(tmp_path / "0.parquet", rows[:20], group)
    write_parquet(tmp_path / "1.parquet", rows[20:], group)
    table = row_files.open_row_files([tmp_path / "0.parquet", tmp_path / "1.parquet"])
    assert len(table) == 50 and table.row_name(20) == f"{tmp_path / '1.parquet'}, row 0"
    for start, stop in ((0, 50), (0, 1), (19, 21), (20, 20), (33, 50), (7, 8)):
        assert list(table.read(start, stop)) == rows[start:stop]


def test_a_large_row_group_is_read_once(tmp_path, monkeypatch):
    """Each shard continues at the end of the last; earlier rows are read from the beginning of the file."""
    write_parquet(tmp_path / "0.parquet", [{"n": number} for number in range(400)], 400)
    batches = []

    class Counted(parquet.ParquetFile):
        def iter_batches(self, *arguments, **names):
            for batch in super().iter_batches(*arguments, **names):
                batches.append(batch.num_rows)
                yield batch

    monkeypatch.setattr(parquet, "ParquetFile", Counted)
    table = row_files.open_row_files([tmp_path / "0.parquet"])
    for first in range(0, 400, 40):
        assert [row["n"] for row in table.read(first, first + 40)] == list(range(first, first + 40))
    assert sum(batches) == 400
    again, ahead = table.read(10, 12), table.read(300, 302)
    assert [next(again), next(ahead), next(again), next(ahead)] == [{"n": n} for n in (10, 300, 11, 301)]
    assert pickle.loads(pickle.dumps(table)) == table


def test_archives_stay_open_and_are_not_pickled(tmp_path):
    write_mmeb(tmp_path, "X", 2, "vqa", zipped=True)
    folder = image_files.ImageFolder(tmp_path, (tmp_path / "images_zip" / "X.zip",))
    assert folder.image("images/X/Train/0.jpg", "x") == picture(0)
    (tmp_path / "images_zip" / "X.zip").rename(tmp_path / "moved.zip")
    assert folder.image("images/X/Train/1.jpg", "x") == picture(1)
    with pytest.raises(UserError, match="X.zip is not a readable ZIP archive"):
        pickle.loads(pickle.dumps(folder)).image("images/X/Train/1.jpg", "x")


def test_negatives_that_no_source_has(tmp_path):
    write_pairs(tmp_path / "with.jsonl", [{"query": "q", "positive": "p", "negatives": ["n"]}])
    write_pairs(tmp_path / "without.jsonl", [{"query": "q", "positive": "p"}])
    for name in ("with", "without"):
        prepare("pairs", tmp_path / f"{name}.jsonl", tmp_path)
    data = DataConfig(dir=str(tmp_path), negatives=1, sources=(("without", 1.0, 0), ("with", 1.0, 0)))
    assert [len(split) for split in sources.training_records(data, 0)] == [1, 1]
    data = dataclasses.replace(data, sources=(("without", 1.0, 0),))
    with pytest.raises(UserError, match="config.data.negatives=1: no pair of without has negatives; set it to 0"):
        sources.training_records(data, 0)


def test_two_processes_do_not_prepare_one_source_at_once(tmp_path):
    write_pairs(tmp_path / "mine.jsonl", [{"query": "a", "positive": "b"}] * 20)
    (tmp_path / "out/mine").mkdir(parents=True)
    with locked(tmp_path / "out/mine/lock", "busy"), pytest.raises(UserError, match="is being prepared by another process"):
        prepare("pairs", tmp_path / "mine.jsonl", tmp_path / "out")
    assert prepare("pairs", tmp_path / "mine.jsonl", tmp_path / "out")["mine"]["rows"]["train"] == 20  # the same pair: one group


def test_a_source_without_good_rows_is_refused(tmp_path):
    write_pairs(tmp_path / "mine.jsonl", [{"query": "", "positive": "b"}] * 3)
    with pytest.raises(UserError, match="no rows are left for training"):
        prepare("pairs", tmp_path / "mine.jsonl", tmp_path / "out", skips=5)


KILLED = """
import sys
from metaembed_jax.data import sources
if __name__ == "__main__":
    sources.prepare_from("pairs", sys.argv[1], sys.argv[2], 2, 0)
"""


def test_workers_end_with_a_preparation_that_is_killed(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    write_pairs(tmp_path / "mine.jsonl", [{"query": f"{n}", "positive": "b"} for n in range(200_000)])
    command = [sys.executable, tmp_path / "killed.py", tmp_path / "mine.jsonl", tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as parent:
        until = time.monotonic() + 60
        while not list(tmp_path.glob("out/mine/*.part/shards/*")):  # a worker is at work
            assert time.monotonic() < until and parent.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        parent.kill()
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < until, "a worker outlives its parent"
        time.sleep(0.05)
