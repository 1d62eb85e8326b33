"""Page retrieval with mined negatives, as Tevatron's data sets hold it: a table of queries, and a corpus that they name pages of.

    queries    query_id, query_text, query_image, positive_document_ids, negative_document_ids        such as Tevatron/colpali
               query_id, query, positive_passages, negative_passages                                  such as Tevatron/wiki-ss-nq
    corpus     docid, image, text                                              Tevatron/colpali-corpus, Tevatron/wiki-ss-corpus

Passages are objects with a `docid`; other columns are not read. (The columns are those that the Hub shows of these sets and that
`src/tevatron/retriever/dataset.py` and `scripts/dataset_transform_scripts` of github.com/texttron/tevatron read and write.)

Both tables are found by their columns, in Parquet or JSON lines anywhere in the folder. Files of several splits lie side by side:
where some are called train-*, only these count. Of several positives the first is taken, and the first `NEGATIVES` negatives:
each is a page, and a set names 20 of them a query.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from metaembed_jax.data.sources.corpus import Copied, Corpus
from metaembed_jax.data.sources.files import inline, inline_image
from metaembed_jax.data.sources.tables import open_table, read_columns
from metaembed_jax.data.sources.writing import Part
from metaembed_jax.errors import UserError

NEGATIVES = 4
FORMS = (
    ("query_id", "query_text", "positive_document_ids", "negative_document_ids"),
    ("query_id", "query", "positive_passages", "negative_passages"),
)


def parts(directory: Path) -> list[Part]:
    """The one part of a folder: it is named as the folder.

    Raises:
      UserError: no queries, no corpus, or more than one of either.
    """
    files = [file for ending in ("parquet", "jsonl") for file in sorted(directory.rglob(f"*.{ending}"))]
    columns = {file: read_columns(file) for file in files if not _is_hidden(file.relative_to(directory))}
    queries = [file for file, names in columns.items() if any(form[2] in names for form in FORMS)]
    corpus = [file for file, names in columns.items() if file not in queries and "docid" in names and names & {"image", "text"}]
    queries = _of_one_set(directory, "queries (" + ", or ".join(", ".join(form) for form in FORMS) + ")", queries)
    corpus = _of_one_set(directory, "documents (docid, image, text)", corpus)
    for file in queries:
        if not any(columns[file].issuperset(form[:3]) for form in FORMS):
            raise UserError(f"{file}: has the columns {', '.join(sorted(columns[file]))}; queries have {' and '.join(FORMS[0])}")
    source = directory.resolve().name
    return [Part(source, open_table(queries), partial(record, source=source), Corpus(open_table(corpus), named))]


def named(row: dict) -> list[str]:
    """The ids of the documents that become a row's positive and negatives, in this order.

    Raises:
      UserError: there is no positive, or a list is none.
    """
    positive, negative = next((form[2:] for form in FORMS if form[2] in row), FORMS[0][2:])
    positives, negatives = _ids(positive, row.get(positive)), _ids(negative, row.get(negative))
    if not positives:
        raise UserError(f"{positive} is empty; a query needs a document that answers it")
    return [positives[0], *[docid for docid in negatives if docid not in positives][:NEGATIVES]]


def record(row: dict, source: str, corpus: Copied) -> dict:
    """A row of queries as a record.

    Raises:
      UserError: an empty query, a document that the corpus does not have, or a broken image.
    """
    positive, *negatives = (corpus.read(docid) for docid in named(row))
    return {"query": _query(row), "positive": positive, "negatives": negatives, "source": source}


def _query(row: dict) -> dict:
    column = next((form[1] for form in FORMS if form[1] in row), FORMS[0][1])
    text = row.get(column) or ""
    if not isinstance(text, str):
        raise UserError(f"{column} is a {type(text).__name__}, not a text")
    found = {"text": text} if text.strip() else {}
    if inline(row.get("query_image")):
        found["image"] = inline_image("query_image")(row["query_image"])
    if not found:
        raise UserError(f"{column} is empty, and there is no query_image")
    return found


def _ids(column: str, values) -> list[str]:
    if not isinstance(values, list | None):
        raise UserError(f"{column} is a {type(values).__name__}, not a list")
    ids = [value.get("docid") if isinstance(value, dict) else value for value in values or ()]
    if wrong := [docid for docid in ids if not isinstance(docid, str | int)]:
        raise UserError(f"{column} has a docid that is {wrong[0]!r}; it must be a text or a whole number")
    return [str(docid) for docid in ids]


def _of_one_set(directory: Path, what: str, files: Iterable[Path]) -> list[Path]:
    """The files, or those of the train split where there is one, if they lie together."""
    files = [file for file in files if file.name.startswith("train")] or list(files)
    folders = sorted({file.parent for file in files})
    if len(folders) != 1:
        found = f"in {folders[0]} and {folders[1]}" if folders else "nowhere"
        raise UserError(f"{directory}: {what} are {found}; --from is a folder that holds one set of queries and its corpus")
    return files


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)
