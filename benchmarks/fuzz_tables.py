"""Tables of JSON lines and Parquet, against json and pyarrow."""

import io
import json
import random
from pathlib import Path

import pyarrow
from fuzz_images import picture
from fuzz_kinds import damage
from pyarrow import parquet

from metaembed_jax.data.documents import open_documents
from metaembed_jax.data.sources import pairs
from metaembed_jax.errors import UserError

FILES = ("a.png", "b/é.jpg")
NO_IMAGES: tuple = (None, "", {"bytes": None, "path": None}, {"bytes": None, "path": ""})
STRANGE: tuple = (0, 1, -1.5, True, False, [], {}, [[]], "", " ", "../a.png", "/etc/passwd", "none.png", "a.png\0", "é" * 300)
STRANGE += ({"bytes": None, "path": "a.png"}, {"path": "a.png"}, {"bytes": "a.png"}, {"bytes": 3, "path": 4}, 10**400, [None])
LINES: tuple = ('{"text": "\\ud800"}', '{"text": NaN}', "[]", "3", "null", "{", "")
LINES += (" \t", '{"text": "a"}{}', "\ufeff{}", '{"a": 1, "a": 2}')
MOST_ITEMS = 12


def make_table(random: random.Random, folder: Path) -> None:
    """Write a table and two images that it may name."""
    (folder / "b").mkdir()
    for file in FILES:
        picture(random, "RGB").save(folder / file)
    if random.random() < 0.4:
        (folder / "rows.parquet").write_bytes(_parquet(random, folder))
    else:
        (folder / "rows.jsonl").write_bytes(_json_lines(random))


def check_table(folder: Path, _: None) -> str | None:
    """Compare the documents of a table, and its pairs, with its rows."""
    file = next(folder.glob("rows.*"))
    reasons = _documents(file, folder), _pairs(file)
    return reasons[0] if all(reasons) else None


def _documents(file: Path, folder: Path) -> str | None:
    """Compare the documents of a table with its rows; return why it is refused."""
    try:
        documents = open_documents(file)
    except UserError as error:
        return str(error)
    rows, reason = _rows(file), None
    assert len(rows) == len(documents), f"{len(documents)} documents of {len(rows)} rows"
    for number, row in list(enumerate(rows))[:MOST_ITEMS]:
        try:
            item, metadata = documents[number], documents.metadata(number)
        except UserError as error:
            reason = str(error)
            continue
        assert row is not None, f"row {number} is accepted, but not by json"
        _compare(item, row.get("text"), row.get("image"), folder, number)
        assert metadata["id"] == str(row.get("id", number)), f"row {number} has the id {metadata['id']!r}"
        json.dumps(metadata, allow_nan=False).encode()
    try:
        assert len(documents.ids()) == len(set(documents.ids())) == len(rows), "ids are not those of the rows"
        assert len(documents.stamps()) == len(rows), "stamps are not those of the rows"
    except UserError as error:
        reason = str(error)
    return reason


def _pairs(file: Path) -> str | None:
    """Compare the records of a table of pairs with its rows; return why it is refused."""
    try:
        (source,) = pairs.find_sources(file)
        rows = list(source.rows.read(0, len(source.rows)))
    except UserError as error:
        return str(error)
    reason = None
    for number, row in enumerate(rows[:MOST_ITEMS]):
        try:
            record = source.record(row)
        except UserError as error:
            reason = str(error)
            continue
        for side in ("query", "positive"):
            _compare(record[side], row.get(side), row.get(f"{side}_image"), file.parent, number)
        texts, images = row.get("negatives") or [], row.get("negative_images") or []
        assert len(record["negatives"]) == max(len(texts), len(images)), f"row {number}: {len(record['negatives'])} negatives"
    return reason


def _compare(item: dict, text: object, image: object, folder: Path, number: int) -> None:
    """Compare an item with the values of its row."""
    assert item.get("text", "") == (text if isinstance(text, str) and text.strip() else ""), f"row {number}: text {text!r}"
    assert text is None or isinstance(text, str), f"row {number}: text {text!r} is accepted"
    if image in NO_IMAGES:
        assert "image" not in item, f"row {number}: an image of {image!r}"
        return
    value = image["bytes"] if isinstance(image, dict) and image.get("bytes") is not None else image
    value = value["path"] if isinstance(value, dict) else value
    content = value if isinstance(value, bytes) else (folder / value).read_bytes()
    assert item.get("image") == content, f"row {number}: its image {str(image)[:60]} is not that of the item"


def _rows(file: Path) -> list[dict | None]:
    """Return the rows of a table by json or pyarrow; None for a row that they refuse."""

    def row(line: bytes) -> dict | None:
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            return None

    if file.suffix == ".parquet":
        opened, rows = parquet.ParquetFile(file), []
        for group in range(opened.num_row_groups):
            try:
                rows += opened.read_row_group(group).to_pylist()
            except (OSError, ValueError, pyarrow.ArrowException):
                rows += [None] * opened.metadata.row_group(group).num_rows
        return rows
    return [row(line) for line in file.read_bytes().split(b"\n") if line.strip()]


def _row(random: random.Random, in_pairs: bool) -> dict:
    """Return a row that is most often right."""
    names = ("query", "query_image", "positive", "positive_image") if in_pairs else ("text", "image")
    row: dict = {name: random.choice(FILES) if "image" in name else f"words {random.random()}" for name in names}
    if random.random() < 0.3:
        row["id"] = random.choice((random.randrange(10**6), str(random.random())))
    if in_pairs and random.random() < 0.5:
        row |= {"negatives": ["a", ""], "negative_images": ["", random.choice(FILES)]}
    if random.random() < 0.3:
        row[random.choice(("price", "page", "__index_level_0__", "path", "ключ"))] = random.choice((1, "x", None, [1], {"a": 1}))
    if random.random() < 0.1:
        row[random.choice(list(row))] = random.choice((None, None, *STRANGE))
    if random.random() < 0.05:
        del row[random.choice(list(row))]
    return row


def _json_lines(random: random.Random) -> bytes:
    in_pairs = random.random() < 0.4
    lines = [json.dumps(_row(random, in_pairs), ensure_ascii=random.random() < 0.5) for _ in range(random.randint(0, 6))]
    if random.random() < 0.25:
        depth = random.choice((10, 1000, 100_000))
        strange = (*LINES, '{"text": ' + "[" * depth + "]" * depth + "}", '{"text": "' + "x" * depth * 20 + '"}', '{"a":' * depth)
        lines.insert(random.randint(0, len(lines)), random.choice(strange))
    data = random.choice(("\n", "\n", "\r\n", "\n\n")).join(lines).encode("utf-8", "surrogatepass")
    return damage(random, data, b'{"text": "other"}') if random.random() < 0.3 else data


def _parquet(random: random.Random, folder: Path) -> bytes:
    def image() -> object:
        content = (folder / random.choice(FILES)).read_bytes()
        path = random.choice((*FILES, None, "no.png"))
        return random.choice(({"bytes": content, "path": path}, {"bytes": None, "path": path}, None, {"bytes": b"", "path": path}))

    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    kinds = {
        "struct": (struct, image),
        "binary": (pyarrow.binary(), lambda: random.choice(((folder / FILES[0]).read_bytes(), None, b"", b"x"))),
        "string": (pyarrow.string(), lambda: random.choice((*FILES, None, "", "no.png"))),
        "large": (pyarrow.large_string(), lambda: random.choice(FILES)),
        "numbers": (pyarrow.int64(), lambda: random.choice((0, 1, None))),
        "list": (pyarrow.list_(pyarrow.string()), lambda: random.choice(([], [FILES[0]], None))),
        "flag": (pyarrow.bool_(), lambda: random.choice((True, False, None))),
        "time": (pyarrow.timestamp("us"), lambda: random.choice((0, 10**15, None))),
        "dictionary": (pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), lambda: random.choice(FILES)),
    }
    count, arrays = random.randint(0, 8), {}
    for name in random.sample(("text", "image", "id", "query", "positive", "query_image", "price"), random.randint(1, 4)):
        usual = {"image": "struct", "query_image": "string"}.get(name, "string")
        kind, value = kinds[usual if random.random() < 0.7 else random.choice(list(kinds))]
        arrays[name] = pyarrow.array([value() for _ in range(count)], kind)
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(arrays), file, row_group_size=random.choice((1, 3, 1000)))
    data = file.getvalue()
    return damage(random, data, b"PAR1") if random.random() < 0.4 else data
