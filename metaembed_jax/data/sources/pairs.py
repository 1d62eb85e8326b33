"""Pairs of a user's own: JSON lines (`.jsonl`, in UTF-8) or Parquet, an object or row for each.

    query, query_image            either or both
    positive, positive_image      either or both
    negatives, negative_images    lists of equal length, or only one of them; may be absent
    teacher_scores, labels        lists of a number for the positive, then for each negative; may be absent (see `candidates`)
    source                        may be absent

Images are paths relative to the file, or inline, as `datasets` stores them in Parquet. Other columns are not read;
a line names them.
"""

from functools import partial
from pathlib import Path

from metaembed_jax.data.sources.candidates import NUMBERS, read_numbers
from metaembed_jax.data.sources.image_files import ImageFolder, image_stamps
from metaembed_jax.data.sources.row_files import open_row_files, print_further_columns
from metaembed_jax.data.sources.shards import RawSource
from metaembed_jax.errors import UserError

IMAGE_COLUMNS = ("query_image", "positive_image", "negative_images")
ENDINGS = (".jsonl", ".parquet")
COLUMNS = {"query", "positive", "negatives", *IMAGE_COLUMNS, *NUMBERS, "source"}


def find_sources(file: Path) -> list[RawSource]:
    """Return the one source of a file, with its name.

    Raises:
      UserError: there is no such file, it has another ending, or it cannot be read.
    """
    if not file.is_file():
        raise UserError(f"{file.absolute()}: no such file; --from is a .jsonl or .parquet of pairs")
    if file.suffix.lower() not in ENDINGS or file.name.startswith("."):
        expected = " with a name before its ending, which names the source" if file.name.startswith(".") else ""
        raise UserError(f"{file.absolute()}: expected .jsonl or .parquet{expected}")
    rows = open_row_files([file])
    print_further_columns(rows, COLUMNS, "not read")
    folder = ImageFolder(file.parent)
    record = partial(to_record, folder=folder, source=file.stem)
    images = partial(image_stamps, folder=folder, columns=IMAGE_COLUMNS)
    return [RawSource(file.stem, rows, record, images, keep_components_together=True)]


def to_record(row: dict, folder: ImageFolder, source: str) -> dict:
    """Return a row as a record.

    Raises:
      UserError: a side has neither text nor image, the lists of candidates differ in length, or an image or number is broken.
    """
    texts, images = ([] if row.get(name) in (None, "") else row[name] for name in ("negatives", "negative_images"))
    if not isinstance(texts, list) or not isinstance(images, list):
        raise UserError("negatives and negative_images: expected lists")
    if not isinstance(row.get("source"), str | None):
        raise UserError(f"source: expected a string, not {type(row['source']).__name__}")
    if texts and images and len(texts) != len(images):
        raise UserError(f"has {len(texts)} negatives and {len(images)} negative_images; expected as many, or only one of the lists")
    count = max(len(texts), len(images))
    negatives = zip(texts or [""] * count, images or [""] * count, strict=True)
    return {
        "query": folder.item("query", row.get("query"), row.get("query_image"), "query_image"),
        "positive": folder.item("positive", row.get("positive"), row.get("positive_image"), "positive_image"),
        "negatives": [
            folder.item(f"negative {number}", text, image, f"negative_images[{number}]")
            for number, (text, image) in enumerate(negatives)
        ],
        "source": row.get("source") or source,
        **read_numbers(row.get("teacher_scores"), row.get("labels"), 1 + count),
    }
