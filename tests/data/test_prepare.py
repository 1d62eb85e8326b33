"""Files of the field to prepared sources: every format, killed and resumed, and what is wrong with a row said by file and row."""

import io
import json

import pytest
from PIL import Image

from metaembed_jax.data import sources
from metaembed_jax.data.sources import records, tables, writing
from metaembed_jax.errors import UserError
from tests.data.field_files import MARK, mmeb_rows, picture, write_colpali, write_mmeb, write_pairs, write_parquet


def read(out, name, split="train"):
    return list(records.open_split(out / name, writing.VERSION, split))


def prepare(kind, path, out, skips=0, workers=0):
    return sources.prepare_from(kind, path, out, workers, skips)


@pytest.mark.parametrize("zipped", [False, True])
def test_mmeb(tmp_path, zipped):
    write_mmeb(tmp_path / "in", "MSCOCO_t2i", 3, "t2i", zipped=zipped)
    write_mmeb(tmp_path / "in", "A-OKVQA", 3, "vqa", zipped=zipped)
    markers = prepare("mmeb", tmp_path / "in", tmp_path / "out")
    assert set(markers) == {"MSCOCO_t2i", "A-OKVQA"}
    for number, found in enumerate(read(tmp_path / "out", "MSCOCO_t2i")):
        image = picture(number)
        assert found == {
            "query": {"text": f"Find: caption {number}\n"},
            "positive": {"text": "Represent the image.\n", "image": image},
            "negatives": [],
            "source": "MSCOCO_t2i",
        }
    for number, found in enumerate(read(tmp_path / "out", "A-OKVQA")):
        assert found["query"] == {"text": f"Answer: question {number}?\n", "image": picture(number)}
        assert found["positive"] == {"text": f"answer {number}"} and found["negatives"] == [{"text": f"answer {number + 1}"}]
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
    def inline(number):
        return None if number is None else {"bytes": picture(number), "path": None}

    row = {"qry": "red", "qry_image": None, "pos_text": f"{MARK}\nthis", "pos_image": inline(1)}
    row |= {"neg_text": [MARK, "words alone"], "neg_image_0": inline(2), "neg_image_1": None}
    write_parquet(tmp_path / "in" / "WebQA" / "train.parquet", [row] * 2)
    prepare("mined", tmp_path / "in", tmp_path / "out")
    found = read(tmp_path / "out", "WebQA")[0]
    assert found["positive"] == {"text": "this", "image": picture(1)}
    assert found["negatives"] == [{"image": picture(2)}, {"text": "words alone"}]


def test_colpali(tmp_path):
    write_colpali(tmp_path / "in", 3)
    prepare("colpali", tmp_path / "in", tmp_path / "out")
    found = read(tmp_path / "out", "colpali")[2]
    assert found["query"] == {"text": "which page is 2?"}
    assert found["positive"] == {"image": picture(1002, "png", 112, 84)}


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


def test_held_out_rows_are_a_search_task(tmp_path):
    rows = [{"query": f"q{number}", "positive": f"p{number // 2}"} for number in range(400)]
    write_pairs(tmp_path / "mine.jsonl", rows)
    marker = prepare("pairs", tmp_path / "mine.jsonl", tmp_path)["mine"]
    assert marker["rows"] == {"train": 360, "validation": 20, "test": 20}
    every = {record["query"]["text"] for split in records.SPLITS for record in read(tmp_path, "mine", split)}
    assert every == {row["query"] for row in rows}
    task = sources.retrieval("mine", tmp_path, "test")
    assert len({str(item) for item in task.candidates}) == len(task.candidates)
    for query, relevant in zip(task.queries, task.relevance, strict=True):
        (candidate,) = relevant
        assert task.candidates[candidate] == {"text": f"p{int(query['text'][1:]) // 2}"}


def test_shards_resume_and_do_not_depend_on_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "SHARD_ROWS", 16)
    monkeypatch.setattr(tables, "MARKED", 3)
    write_pairs(tmp_path / "mine.jsonl", [{"query": f"q{number}", "positive": "p"} for number in range(100)])
    whole = prepare("pairs", tmp_path / "mine.jsonl", tmp_path / "whole")["mine"]
    written = []

    def killed_at_the_fourth(job, shard, write=writing._write_shard):
        written.append(shard)
        if len(written) == 4:
            raise KeyboardInterrupt
        return write(job, shard)

    monkeypatch.setattr(writing, "_write_shard", killed_at_the_fourth)
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
    write_pairs(tmp_path / "mine.jsonl", [{"query": "other", "positive": "p"}])
    with pytest.raises(UserError, match="killed/mine: is prepared already, from other files than .*mine.jsonl; remove it"):
        prepare("pairs", tmp_path / "mine.jsonl", tmp_path / "killed")
    assert prepare("pairs", tmp_path / "mine.jsonl", tmp_path / "other")["mine"]["fingerprint"] != whole["fingerprint"]


def test_json_lines_are_found_again_by_their_marks(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MARKED", 3)
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps({"n": "ü" * n}) for n in range(20)) + "\n")
    table = tables.open_table([tmp_path / "a.jsonl"])
    for start in range(20):
        assert [len(row["n"]) for row in table.read(start, 20)] == list(range(start, 20))


def test_workers_write_the_same(tmp_path):
    write_mmeb(tmp_path / "in", "CIRR", 30, "it2it")
    one = prepare("mmeb", tmp_path / "in", tmp_path / "one")
    assert prepare("mmeb", tmp_path / "in", tmp_path / "two", workers=2) == one
    assert read(tmp_path / "one", "CIRR") == read(tmp_path / "two", "CIRR")


@pytest.mark.parametrize("group", [3, 1000])
def test_tables_read_from_anywhere(tmp_path, group):
    rows = [{"n": number} for number in range(50)]
    write_parquet(tmp_path / "0.parquet", rows[:20], group)
    write_parquet(tmp_path / "1.parquet", rows[20:], group)
    table = tables.open_table([tmp_path / "0.parquet", tmp_path / "1.parquet"])
    assert len(table) == 50 and table.place(20) == f"{tmp_path / '1.parquet'}, row 0"
    for start, stop in ((0, 50), (0, 1), (19, 21), (20, 20), (33, 50), (7, 8)):
        assert list(table.read(start, stop)) == rows[start:stop]


def truncated(content):
    return content[: len(content) // 2]


def white(side):
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "png")
    return file.getvalue()


def huge():
    return white(30_000)


def large():
    return white(10_000)


@pytest.mark.parametrize(
    "image, message",
    [
        (lambda: truncated(picture(0, "png")), "1.png cannot be read"),
        (lambda: truncated(picture(0)), "1.png cannot be read"),
        (lambda: b"\xff\xd8nonsense", "1.png cannot be read"),
        (lambda: b"", "1.png cannot be read"),
        (huge, "1.png cannot be read (Image size (900000000 pixels) exceeds limit"),
        (large, "1.png: the image is 10000x10000 pixels"),
    ],
    ids=["truncated png", "truncated jpeg", "broken jpeg", "empty", "huge", "large"],
)
def test_bad_images_are_named_by_file_and_row(tmp_path, image, message):
    (tmp_path / "0.png").write_bytes(picture(0, "png"))
    (tmp_path / "1.png").write_bytes(image())
    write_pairs(tmp_path / "mine.jsonl", [{"query": "q", "positive_image": f"{number}.png"} for number in (0, 1)])
    with pytest.raises(UserError) as caught:
        prepare("pairs", tmp_path / "mine.jsonl", tmp_path / "out")
    assert f"{tmp_path / 'mine.jsonl'}, row 1: " in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"qry_image_path": "images/X/9.jpg"}, "images/X/9.jpg is missing"),
        ({"qry_image_path": "../secret.jpg"}, "leads out of"),
        ({"qry_image_path": "/etc/passwd"}, "leads out of"),
        ({"qry_image_path": ""}, "no image stands beside it"),
        ({"qry": "no mark"}, "no mark"),
        ({"qry": MARK + MARK}, "twice"),
        ({"pos_text": ""}, "pos_text is empty, and has no image"),
        ({"neg_text": ["a", "b"], "neg_image_path": ["", "", ""]}, "neg_text has 2 entries and neg_image_path 3"),
    ],
)
def test_bad_rows_of_mmeb(tmp_path, change, message):
    write_mmeb(tmp_path, "X", 3, "vqa")
    rows = mmeb_rows("X", 3, "vqa")
    if isinstance(change.get("neg_text"), list):
        rows = [row | {"neg_text": ["a"], "neg_image_path": [""]} for row in rows]
    rows[2] |= change
    file = tmp_path / "X" / "original-00000-of-00001.parquet"
    write_parquet(file, rows)
    with pytest.raises(UserError) as caught:
        prepare("mmeb", tmp_path, tmp_path / "out")
    assert f"{file}, row 2: " in str(caught.value) and message in str(caught.value)
    marker = prepare("mmeb", tmp_path, tmp_path / "out", skips=1)["X"]
    assert marker["rows"]["train"] == 2 and marker["skipped"] == 1


def test_images_one_level_off(tmp_path):
    write_mmeb(tmp_path, "X", 2, "vqa")
    (tmp_path / "images" / "X").rename(tmp_path / "X.images")
    (tmp_path / "images").rmdir()
    (tmp_path / "X.images").rename(tmp_path / "X" / "was")
    (tmp_path / "X" / "Train").mkdir()
    rows = [row | {"qry_image_path": row["qry_image_path"].removeprefix("images/")} for row in mmeb_rows("X", 2, "vqa")]
    (tmp_path / "images" / "X" / "Train").mkdir(parents=True)
    for number in range(2):
        (tmp_path / "images" / "X" / "Train" / f"{number}.jpg").write_bytes(picture(number))
    write_parquet(tmp_path / "X" / "original-00000-of-00001.parquet", rows)
    with pytest.raises(UserError, match=r"row 0: the image .*X/Train/0.jpg is missing, but .*images/X/Train/0.jpg is there"):
        prepare("mmeb", tmp_path, tmp_path / "out")


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="no source 'flickr'; there are icons, boards, mmeb"):
        prepare("flickr", tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="has no {subset}/original"):
        prepare("mmeb", tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        prepare("pairs", tmp_path / "none.jsonl", tmp_path / "out")
    write_parquet(tmp_path / "X" / "original-0.parquet", [{"qry": "a", "pos_text": "b"}])
    with pytest.raises(
        UserError, match=r"original-0.parquet: lacks the column qry_image_path, pos_image_path; it has pos_text, qry"
    ):
        prepare("mmeb", tmp_path, tmp_path / "out")
    (tmp_path / "X" / "original-0.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="original-0.parquet: is no Parquet file"):
        prepare("mmeb", tmp_path, tmp_path / "out")
    for line, message in (("{", "row 1: is no JSON"), ("[1]", "row 1: is a list"), ('{"querry": 1}', "row 1: has querry")):
        (tmp_path / "mine.jsonl").write_text(json.dumps({"query": "a", "positive": "b"}) + f"\n\n{line}\n")
        with pytest.raises(UserError, match=message):
            prepare("pairs", tmp_path / "mine.jsonl", tmp_path / "out")
    (tmp_path / "mine.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no rows to read"):
        prepare("pairs", tmp_path / "mine.jsonl", tmp_path / "out")
