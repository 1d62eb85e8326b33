"""Errors of bad rows, of any kind of source: they name the file and the row."""

import functools
import io
import json

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from metaembed_jax.data import sources
from metaembed_jax.data.sources import image_files
from metaembed_jax.errors import UserError
from tests.data.field_files import (
    MARK,
    inline,
    mmeb_rows,
    picture,
    tevatron_corpus,
    tevatron_queries,
    write_mmeb,
    write_pairs,
    write_parquet,
    write_tevatron,
)


def prepare(kind, path, out, skips=0):
    return sources.prepare_from(kind, path, out, 0, skips)


def truncated(content):
    return content[: len(content) // 2]


def overwritten(content):
    middle = len(content) // 2
    return content[:middle] + bytes(512) + content[middle + 512 :]


@functools.cache
def white(side):
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "png")
    return file.getvalue()


def huge():
    return white(30_000)


def large():
    return white(12_000)


BAD_IMAGES = {
    "png cut at half": (lambda: truncated(picture(0, "png")), "cannot be read"),
    "jpeg cut at half": (lambda: truncated(picture(0)), "cannot be read"),
    "jpeg cut at nine tenths": (lambda: picture(0)[: len(picture(0)) * 9 // 10], "cannot be read"),
    "jpeg without its last 100 bytes": (lambda: picture(0)[:-100], "cannot be read"),
    "jpeg without its last byte": (lambda: picture(0)[:-1], "cannot be read"),
    "png with a block of others": (lambda: overwritten(picture(0, "png")), "cannot be read"),
    "broken jpeg": (lambda: b"\xff\xd8nonsense", "cannot be read"),
    "huge": (huge, "the image is 30000x30000 pixels, 3,434 MiB in memory; expected at most 512 MiB"),
    "large": (large, "the image is 12000x12000 pixels"),
    "no image": (lambda: b"<svg></svg>", "cannot be read: its format is none of JPEG, PNG"),
    "a line": (lambda: picture(0, height=201, width=1), "is 1x201: one side is over 200 times the other"),
}


def write_mmeb_image(directory, image):
    write_mmeb(directory, "X", 3, "it2it")
    (directory / "images" / "X" / "Train" / "2.jpg").write_bytes(image)
    rows = mmeb_rows("X", 3, "it2it")  # picture 2 is that of the last query, and the first positive
    rows[0]["pos_image_path"] = rows[1]["qry_image_path"]
    file = directory / "X" / "original-00000-of-00001.parquet"
    write_parquet(file, rows)
    return directory, file


def write_mined_image(directory, image):
    rows = [{"qry": "q", "qry_image": None, "pos_text": MARK, "pos_image": inline(picture(n)), "neg_text": []} for n in range(3)]
    rows[2]["pos_image"] = inline(image)
    write_parquet(directory / "X" / "train.parquet", rows)
    return directory, directory / "X" / "train.parquet"


def write_colpali_image(directory, image):
    rows = [{"query": "q", "image": inline(content)} for content in (picture(0), picture(1), image)]
    write_parquet(directory / "train-0.parquet", rows)
    return directory, directory / "train-0.parquet"


def write_tevatron_image(directory, image):
    documents = tevatron_corpus(3)
    documents[0]["image"] = inline(image)  # of the page 2
    write_tevatron(directory, [row | {"negative_document_ids": []} for row in tevatron_queries(3)], documents)
    return directory, directory / "queries" / "train-00000-of-00001.parquet"


def write_pairs_image(directory, image):
    directory.mkdir()
    (directory / "0.png").write_bytes(picture(0, "png"))
    (directory / "2.png").write_bytes(image)
    write_pairs(directory / "mine.jsonl", [{"query": "q", "positive_image": f"{number}.png"} for number in (0, 0, 2)])
    return directory / "mine.jsonl", directory / "mine.jsonl"


WITH_IMAGE = {
    "mmeb": write_mmeb_image,
    "mined": write_mined_image,
    "colpali": write_colpali_image,
    "tevatron": write_tevatron_image,
    "pairs": write_pairs_image,
}


@pytest.mark.parametrize("name", BAD_IMAGES)
@pytest.mark.parametrize("kind", WITH_IMAGE)
def test_bad_images_are_named_by_file_and_row(tmp_path, kind, name):
    image, message = BAD_IMAGES[name]
    path, file = WITH_IMAGE[kind](tmp_path / "in", image())
    with pytest.raises(UserError) as caught:
        prepare(kind, path, tmp_path / "out")
    assert str(caught.value).startswith(f"{file}, row 2: ") and message in str(caught.value)


def test_what_a_decoder_does_not_notice_passes():
    """A JPEG has no checksum: a changed byte may change only some pixels, as `check_image` documents."""
    content = bytearray(picture(0))
    content[len(content) // 2] ^= 1
    assert image_files.check_image(bytes(content), "image") == bytes(content)


COLUMNS = {"mmeb": "pos_image_path", "mined": "pos_image", "colpali": "image", "tevatron": "docid"}


@pytest.mark.parametrize("kind", COLUMNS)
def test_missing_columns(tmp_path, kind):
    path, _ = WITH_IMAGE[kind](tmp_path / "in", picture(2))
    file = min(path.rglob("*.parquet"))
    rows = parquet.read_table(file)
    other = file.with_name(file.name.replace("train-0", "train-1").replace("original-0", "original-1").replace("train.", "also."))
    parquet.write_table(rows.drop_columns([COLUMNS[kind]]), other)
    if kind == "tevatron":  # its tables are found by their columns
        for file in (path / "corpus" / "data").glob("train-0*"):
            file.unlink()
    message = "documents .* are missing" if kind == "tevatron" else f"{other} lacks the column {COLUMNS[kind]}; it has "
    with pytest.raises(UserError, match=message):
        prepare(kind, path, tmp_path / "out")


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("mined", {"pos_image": None}, "pos_text '<|image_1|>' has the mark <|image_1|>, and no image next to it"),
        ("mined", {"pos_text": "no mark"}, "pos_text 'no mark' has no mark <|image_1|>, and an image next to it"),
        ("mined", {"pos_text": "", "pos_image": None}, "pos_text is empty, and has no image"),
        ("mined", {"qry": None}, "qry is empty, and has no image"),
        ("colpali", {"query": " "}, "query is ' '; expected a text"),
        ("colpali", {"image": None}, "image is empty; expected the page that answers the query"),
    ],
)
def test_bad_rows_with_images_inline(tmp_path, kind, change, message):
    path, file = WITH_IMAGE[kind](tmp_path / "in", picture(2))
    rows = parquet.read_table(file).to_pylist()
    rows[2] |= change
    write_parquet(file, rows)
    with pytest.raises(UserError) as caught:
        prepare(kind, path, tmp_path / "out")
    assert str(caught.value).startswith(f"{file}, row 2: {message}")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"positive": None}, "positive has neither text nor image"),
        ({"query": "", "query_image": ""}, "query has neither text nor image"),
        ({"query": 5}, "query: expected a string, not int"),
        ({"query_image": 5}, "query_image is 5; expected the path of an image"),
        ({"query_image": 0}, "query_image is 0; expected the path of an image"),
        ({"positive_image": False}, "positive_image is False; expected the path of an image"),
        ({"positive_image": []}, "positive_image is []; expected the path of an image"),
        ({"positive_image": {}}, "positive_image is {}; expected the path of an image"),
        ({"positive_image": {"url": "x"}}, "positive_image is {'url': 'x'}; expected the path of an image"),
        ({"positive_image": {"bytes": None, "path": "none.png"}}, "positive_image: the image IN/none.png is missing"),
        ({"positive_image": {"bytes": None, "path": "../secret.png"}}, "leads out of IN"),
        ({"negatives": 0}, "negatives and negative_images: expected lists"),
        ({"negatives": ["a"], "negative_images": [0]}, "negative_images[0] is 0; expected the path of an image"),
        ({"query_image": "a/b.png"}, "IN/a/b.png is missing"),
        ({"query_image": "other.png"}, "IN/other.png is missing, but IN/images/other.png exists: move the images"),
        ({"query_image": "x" * 300 + ".png"}, "x.png is missing"),
        ({"query_image": "../in/a.png"}, "leads out of IN"),
        ({"query_image": "https://x.org/a.png"}, "query_image: 'https://x.org/a.png' is an address, which is not read; download"),
        ({"query_image": {"bytes": None, "path": "gs://x/a.png"}}, "query_image: 'gs://x/a.png' is an address, which is not read"),
        ({"query_image": "link.png"}, "IN/link.png is a link out of IN"),
        ({"negatives": "abc"}, "negatives and negative_images: expected lists"),
        ({"negatives": [5]}, "negative 0: expected a string, not int"),
        ({"negatives": ["a"], "negative_images": ["", ""]}, "has 1 negatives and 2 negative_images"),
        ({"source": 5}, "source: expected a string, not int"),
        ({"query": "\ud800"}, "has a lone surrogate"),
    ],
)
def test_bad_rows_of_pairs(tmp_path, change, message):
    directory = tmp_path / "in"
    (directory / "images").mkdir(parents=True)
    (directory / "images" / "other.png").write_bytes(picture(0, "png"))
    (tmp_path / "secret.png").write_bytes(picture(0, "png"))
    (directory / "link.png").symlink_to(tmp_path / "secret.png")
    row = {"query": "q", "positive": "p"}
    write_pairs(directory / "mine.jsonl", [row, row, row | change])
    with pytest.raises(UserError) as caught:
        prepare("pairs", directory / "mine.jsonl", tmp_path / "out")
    error = str(caught.value).replace(str(directory), "IN")
    assert error.startswith("IN/mine.jsonl, row 2") and message in error


@pytest.mark.parametrize(
    "change, message",
    [
        ({"qry_image_path": "images/X/9.jpg"}, "images/X/9.jpg is missing"),
        ({"qry_image_path": "../secret.jpg"}, "leads out of"),
        ({"qry_image_path": "/etc/passwd"}, "leads out of"),
        ({"qry_image_path": ""}, "no image next to it"),
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
    assert marker["rows"]["train"] == 2 and len(marker["left_out"]) == 1


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
    with pytest.raises(
        UserError, match=r"row 0: qry_image_path: the image .*X/Train/0.jpg is missing, but .*images/X/Train/0.jpg exists"
    ):
        prepare("mmeb", tmp_path, tmp_path / "out")


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="unknown source 'flickr'; allowed: icons, boards, mmeb"):
        prepare("flickr", tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="has no {subset}/original"):
        prepare("mmeb", tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        prepare("pairs", tmp_path / "none.jsonl", tmp_path / "out")
    write_parquet(tmp_path / "X" / "original-0.parquet", [{"qry": "a", "pos_text": "b"}])
    with pytest.raises(
        UserError, match=r"original-0.parquet lacks the column qry_image_path, pos_image_path; it has pos_text, qry"
    ):
        prepare("mmeb", tmp_path, tmp_path / "out")
    (tmp_path / "X" / "original-0.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="original-0.parquet is not a readable Parquet file"):
        prepare("mmeb", tmp_path, tmp_path / "out")
    for line, message in (
        ("{", " is not JSON"),
        ("[1]", ": expected an object"),
        ('{"querry": 1}', ": query has neither text nor image"),
    ):
        (tmp_path / "mine.jsonl").write_text(json.dumps({"query": "a", "positive": "b"}) + f"\n\n{line}\n")
        with pytest.raises(UserError, match=f"row 1{message}"):
            prepare("pairs", tmp_path / "mine.jsonl", tmp_path / "out")
    (tmp_path / "mine.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no rows to read"):
        prepare("pairs", tmp_path / "mine.jsonl", tmp_path / "out")


@pytest.mark.parametrize(
    "name, message",
    [
        ("picture.png", "picture.png: expected .jsonl or .parquet$"),
        ("mine", "mine: expected .jsonl or .parquet$"),
        (".jsonl", ".jsonl: expected .jsonl or .parquet with a name before its ending"),
        ("..parquet", "..parquet: expected .jsonl or .parquet with a name before its ending"),
    ],
)
def test_files_of_pairs_have_a_name_and_a_known_ending(tmp_path, name, message):
    write_pairs(tmp_path / name, [{"query": "a", "positive": "b"}])
    with pytest.raises(UserError, match=f"^{tmp_path}/{message}"):
        prepare("pairs", tmp_path / name, tmp_path / "out")


def test_json_lines_are_in_utf_8(tmp_path):
    file, line = tmp_path / "mine.jsonl", json.dumps({"query": "Grün", "positive": "b"}, ensure_ascii=False)
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        file.write_bytes(f"{line}\r\n".encode(encoding))
        with pytest.raises(UserError, match=f"^{file} is in UTF-16; save it as UTF-8$"):
            prepare("pairs", file, tmp_path / "out")
    for content in (line.encode("latin-1"), b'{"query": "\xed\xa0\x80", "positive": "b"}'):  # the last is a surrogate
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"{file}, row 0 is not JSON .*utf-8"):
            prepare("pairs", file, tmp_path / "out")
    for first in ("", "\r\n"):
        file.write_bytes(f"{first}{line}\r\n{line}\r\n".encode("utf-8-sig"))
        (marker,) = prepare("pairs", file, tmp_path / f"out{len(first)}").values()
        assert marker["rows"]["train"] == 2


def test_columns_of_one_name(tmp_path):
    columns = [pyarrow.array(values) for values in (["a"], ["b"], ["c"])]
    parquet.write_table(pyarrow.Table.from_arrays(columns, ["query", "positive", "query"]), tmp_path / "mine.parquet")
    with pytest.raises(UserError, match="mine.parquet has two columns of the name 'query'; rename or remove one"):
        prepare("pairs", tmp_path / "mine.parquet", tmp_path / "out")


def test_a_parquet_file_with_fewer_rows_than_it_says(tmp_path, monkeypatch):
    write_parquet(tmp_path / "mine.parquet", [{"query": "a", "positive": "b"}] * 3)
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", lambda *_, **__: iter(()))
    with pytest.raises(UserError, match="mine.parquet, row 0 cannot be read .*fewer rows than it says"):
        prepare("pairs", tmp_path / "mine.parquet", tmp_path / "out")
