"""The train set of ColPali (`vidore/colpali_train_set`, arXiv 2407.01449): a query, and the page that answers it.

DIR/**/train-*.parquet with the columns image and query; others (image_filename, answer, source, ...) are not read.
"""

from functools import partial
from pathlib import Path

from metaembed_jax.data.sources.image_files import ImageFolder, image_stamps
from metaembed_jax.data.sources.row_files import check_columns, open_row_files
from metaembed_jax.data.sources.shards import RawSource
from metaembed_jax.errors import UserError

NAME = "colpali"


def find_sources(directory: Path) -> list[RawSource]:
    """Return the one source of the set.

    Raises:
      UserError: it is not in the folder, or lacks a column.
    """
    files = sorted(directory.rglob("train-*.parquet"))
    if not files:
        raise UserError(f"{directory} has no train-*.parquet; --from is the folder that colpali_train_set was fetched to")
    rows = open_row_files(files)
    check_columns(rows, ("image", "query"))
    folder = ImageFolder(files[0].parent)
    images = partial(image_stamps, folder=folder, columns=("image",))
    return [RawSource(NAME, rows, partial(to_record, folder=folder), images)]


def to_record(row: dict, folder: ImageFolder) -> dict:
    """Return a row as a record.

    Raises:
      UserError: the query has no words, or the page is broken.
    """
    if not isinstance(row["query"], str) or not row["query"].strip():
        raise UserError(f"query is {row['query']!r}; expected a text")
    image = folder.image(row["image"], "image")
    if not image:
        raise UserError("image is empty; expected the page that answers the query")
    return {"query": {"text": row["query"]}, "positive": {"image": image}, "negatives": [], "source": NAME}
