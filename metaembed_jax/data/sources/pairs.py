"""A user's own pairs: JSON lines or Parquet, an object or row for each.

    query, query_image            either or both
    positive, positive_image      either or both
    negatives, negative_images    lists of equal length (or one of them alone); may be absent
    source                        may be absent

Images are paths relative to the file, or inline, as `datasets` stores them in Parquet.
"""

from functools import partial
from pathlib import Path

from metaembed_jax.data.sources.files import ImageFolder
from metaembed_jax.data.sources.tables import open_table
from metaembed_jax.data.sources.writing import Part
from metaembed_jax.errors import UserError

COLUMNS = {"query", "query_image", "positive", "positive_image", "negatives", "negative_images", "source"}


def parts(file: Path) -> list[Part]:
    """The one part: it is named as the file.

    Raises:
      UserError: no such file, or columns that nothing would read.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; --from is a .jsonl or .parquet of pairs")
    table = open_table([file])
    if unknown := table.columns() - COLUMNS:
        raise UserError(f"{file}: has the column {', '.join(sorted(unknown))}; there are {', '.join(sorted(COLUMNS))}")
    return [Part(file.stem, table, partial(record, folder=ImageFolder(file.parent), source=file.stem))]


def record(row: dict, folder: ImageFolder, source: str) -> dict:
    """A row as a record.

    Raises:
      UserError: a side with neither text nor image, negatives that do not fit together, or a broken image.
    """
    if unknown := row.keys() - COLUMNS:
        raise UserError(f"has {', '.join(sorted(unknown))}; there are {', '.join(sorted(COLUMNS))}")
    texts, images = row.get("negatives") or [], row.get("negative_images") or []
    if not isinstance(texts, list) or not isinstance(images, list):
        raise UserError("negatives and negative_images must be lists")
    if not isinstance(row.get("source"), str | None):
        raise UserError(f"source is a {type(row['source']).__name__}, not a text")
    if texts and images and len(texts) != len(images):
        raise UserError(f"has {len(texts)} negatives and {len(images)} negative_images; there must be as many, or none of one")
    count = max(len(texts), len(images))
    negatives = zip(texts or [""] * count, images or [""] * count, strict=True)
    return {
        "query": folder.item("query", row.get("query"), row.get("query_image")),
        "positive": folder.item("positive", row.get("positive"), row.get("positive_image")),
        "negatives": [folder.item(f"negative {number}", text, image) for number, (text, image) in enumerate(negatives)],
        "source": row.get("source") or source,
    }
