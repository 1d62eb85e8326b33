"""Page retrieval: the train set of ColPali (`vidore/colpali_train_set`, arXiv 2407.01449), a query and the page that answers it.

DIR/**/train-*.parquet with the columns image, query, and others that are not read (image_filename, answer, source, ...).
"""

from functools import partial
from pathlib import Path

from metaembed_jax.data.sources.files import inline_image
from metaembed_jax.data.sources.tables import open_table
from metaembed_jax.data.sources.writing import Part, need_columns
from metaembed_jax.errors import UserError


def parts(directory: Path) -> list[Part]:
    """The one part of the set.

    Raises:
      UserError: it is not there, or a column is missing.
    """
    files = sorted(directory.rglob("train-*.parquet"))
    if not files:
        raise UserError(f"{directory}: has no train-*.parquet; --from is the folder that colpali_train_set was fetched to")
    table = open_table(files)
    need_columns(table, ("image", "query"))
    return [Part("colpali", table, partial(record, source="colpali"))]


def record(row: dict, source: str) -> dict:
    """A row as a record. Raises UserError for a query without words, or a broken page."""
    if not isinstance(row["query"], str) or not row["query"].strip():
        raise UserError(f"query is {row['query']!r}, not a text")
    image = {"image": inline_image("image")(row["image"])}
    return {"query": {"text": row["query"]}, "positive": image, "negatives": [], "source": source}
