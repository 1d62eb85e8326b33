"""MMEB-train (`TIGER-Lab/MMEB-train`, arXiv 2410.05160): a folder of subsets, each of them a source of its own.

    DIR/{subset}/{split}-*.parquet      qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path
    DIR/images/{subset}/...             or, as delivered, DIR/images_zip/{subset}.zip

Splits are `original` (source mmeb) and `diverse_instruction` (source mmeb_diverse). The variant with mined negatives (source
mined) holds its images inline: qry, qry_image, pos_text, pos_image, neg_text, neg_image_0, neg_image_1, ...

`<|image_1|>` marks the image in a text. Our prompts put the image first, so the mark is taken out, with the blanks behind it.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from metaembed_jax.data.sources.files import ImageFolder, inline, inline_image
from metaembed_jax.data.sources.tables import Table, open_table
from metaembed_jax.data.sources.writing import Part, need_columns
from metaembed_jax.errors import UserError

MARK = "<|image_1|>"


def parts(directory: Path, split: str = "original") -> list[Part]:
    """The subsets of a folder of MMEB-train.

    Raises:
      UserError: there is none, or a column is missing.
    """
    made = []
    for subset, table in _subsets(directory, f"{split}-*.parquet", ("qry", "qry_image_path", "pos_text", "pos_image_path")):
        archive = directory / "images_zip" / f"{subset}.zip"
        folder = ImageFolder(directory, (archive,) if archive.is_file() else ())
        made.append(Part(subset, table, partial(record, folder=folder, source=subset)))
    return made


def diverse_parts(directory: Path) -> list[Part]:
    """As `parts`, of the other split."""
    return parts(directory, "diverse_instruction")


def mined_parts(directory: Path) -> list[Part]:
    """The subsets of a folder of the variant with mined negatives: DIR/{subset}/*.parquet."""
    tables = _subsets(directory, "*.parquet", ("qry", "qry_image", "pos_text", "pos_image"))
    return [Part(subset, table, partial(mined_record, source=subset)) for subset, table in tables]


def _subsets(directory: Path, pattern: str, columns: Sequence[str]) -> list[tuple[str, Table]]:
    """(name, rows) of the folders of a folder that hold such files."""
    found = {}
    for file in sorted(directory.glob(f"*/{pattern}")):
        found.setdefault(file.parent.name, []).append(file)
    if not found:
        raise UserError(f"{directory}: has no {{subset}}/{pattern}; --from is the folder that the data set was fetched to")
    tables = [(subset, open_table(files)) for subset, files in found.items()]
    for _, table in tables:
        need_columns(table, columns)
    return tables


def record(row: dict, folder: ImageFolder, source: str) -> dict:
    """A row of MMEB-train as a record.

    Raises:
      UserError: names the column and what is wrong with it.
    """
    texts, paths = _listed(row.get("neg_text")), _listed(row.get("neg_image_path"))
    if texts and paths and len(texts) != len(paths):
        raise UserError(f"neg_text has {len(texts)} entries and neg_image_path {len(paths)}; there must be as many")
    count = max(len(texts), len(paths))
    negatives = zip(texts or [""] * count, paths or [""] * count, strict=True)
    return {
        "query": item("qry", row["qry"], row["qry_image_path"], folder.read),
        "positive": item("pos_text", row["pos_text"], row["pos_image_path"], folder.read),
        "negatives": [item("neg_text", text, path, folder.read) for text, path in negatives if text or path],
        "source": source,
    }


def mined_record(row: dict, source: str) -> dict:
    """A row with its images inline as a record."""
    images = [row[f"neg_image_{number}"] for number in range(len(row)) if f"neg_image_{number}" in row]
    texts = _listed(row.get("neg_text"))
    count = max(len(texts), len(images))
    texts, images = texts + [""] * (count - len(texts)), images + [None] * (count - len(images))
    negatives = [(text, image) for text, image in zip(texts, images, strict=True) if text or inline(image)]
    return {
        "query": item("qry", row["qry"], row["qry_image"], inline_image("qry_image")),
        "positive": item("pos_text", row["pos_text"], row["pos_image"], inline_image("pos_image")),
        "negatives": [item("neg_text", text, image, inline_image("neg_image")) for text, image in negatives],
        "source": source,
    }


def item(column: str, text: str | None, image, read) -> dict:
    """Text with its mark, and what `read` takes to give an image.

    Raises:
      UserError: a mark without an image, an image without a mark, or neither text nor image.
    """
    text = text or ""
    if not isinstance(text, str):
        raise UserError(f"{column} is a {type(text).__name__}, not a text")
    if (MARK in text) != bool(image):
        raise UserError(
            f"{column} {text[:60]!r} has {'the mark' if MARK in text else 'no mark'} {MARK}, and "
            f"{'an' if image else 'no'} image stands beside it"
        )
    found = {"image": read(image)} if image else {}
    before, _, after = text.partition(MARK)
    if MARK in after:
        raise UserError(f"{column} {text[:60]!r} has the mark {MARK} twice; an item has one image")
    words = before + after.lstrip() if image else text
    if words.strip():
        found["text"] = words
    if not found:
        raise UserError(f"{column} is empty, and has no image")
    return found


def _listed(value) -> list:
    """Negatives may be absent, one, or several."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
