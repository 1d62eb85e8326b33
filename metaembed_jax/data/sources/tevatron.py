"""Queries with mined negatives in the format of Tevatron's data sets: a table of queries, and the corpus of their documents.

    queries    query_id, query_text, query_image, positive_document_ids, negative_document_ids        such as Tevatron/colpali
               query_id, query, positive_passages, negative_passages                                  such as Tevatron/wiki-ss-nq
    corpus     docid, image, text                                              Tevatron/colpali-corpus, Tevatron/wiki-ss-corpus

Passages are objects with a `docid`. They may have a `score`, from the teacher that Tevatron distils, and a `label`, the weight
of a right answer; ids may be such objects too. Other columns are not read. (The columns are those that the Hub shows of
these sets, and that `src/tevatron/retriever/dataset.py` and `scripts/dataset_transform_scripts` of github.com/texttron/tevatron
read and write.)

Both tables are found by their columns, in Parquet or JSON lines anywhere in the folder. If some files are called train-*, the
others are left out, because they are of other splits. The first positive is taken, then `NEGATIVES` documents (each is a page, and
a set has 20 negatives for a query): other positives that have a label, which are further positives, then negatives.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from metaembed_jax.data.sources.candidates import read_numbers
from metaembed_jax.data.sources.corpus import Corpus, CorpusCopy
from metaembed_jax.data.sources.image_files import ImageFolder, image_stamps
from metaembed_jax.data.sources.row_files import open_row_files, read_columns
from metaembed_jax.data.sources.shards import RawSource
from metaembed_jax.errors import UserError

NEGATIVES = 4
FORMS = (
    ("query_id", "query_text", "positive_document_ids", "negative_document_ids"),
    ("query_id", "query", "positive_passages", "negative_passages"),
)


def find_sources(directory: Path) -> list[RawSource]:
    """Return the one source of a folder, with its name.

    Raises:
      UserError: the folder has no queries or no corpus, or several of them.
    """
    files = [file for ending in (".parquet", ".jsonl") for file in sorted(directory.rglob("*")) if file.suffix.lower() == ending]
    columns = {file: read_columns(file) for file in files if not _is_hidden(file.relative_to(directory))}
    queries = [file for file, names in columns.items() if any(form[2] in names for form in FORMS)]
    corpus = [file for file, names in columns.items() if file not in queries and "docid" in names and names & {"image", "text"}]
    queries = _files_of_one_set(directory, "queries (" + ", or ".join(", ".join(form) for form in FORMS) + ")", queries)
    corpus = _files_of_one_set(directory, "documents (docid, image, text)", corpus)
    for file in queries:
        if not any(columns[file].issuperset(form[:3]) for form in FORMS):
            raise UserError(f"{file} has the columns {', '.join(sorted(columns[file]))}; queries have {' and '.join(FORMS[0])}")
    source = directory.resolve().name
    folder, rows = ImageFolder(queries[0].parent), open_row_files(queries)
    record = partial(to_record, folder=folder, source=source)
    images = partial(image_stamps, folder=folder, columns=("query_image",))
    return [RawSource(source, rows, record, images, Corpus(open_row_files(corpus), document_ids))]


class Passage(NamedTuple):
    """A document that a row names.

    Attributes:
      score, label: as the row gives them; None if it does not.
    """

    docid: str
    score: object
    label: object


def document_ids(row: dict) -> list[str]:
    """Return the ids of a row's positive, then of its further documents.

    Raises:
      UserError: there is no positive, or a column is not a list.
    """
    return [passage.docid for passage in _candidates(row)]


def _candidates(row: dict) -> list[Passage]:
    positive, negative = next((form[2:] for form in FORMS if form[2] in row), FORMS[0][2:])
    positives, negatives = _passages(positive, row.get(positive)), _passages(negative, row.get(negative))
    if not positives:
        raise UserError(f"{positive} is empty; a query needs a document that answers it")
    first, *others = positives
    answers = {passage.docid for passage in positives}
    further = list({passage.docid: passage for passage in others if passage.label and passage.docid != first.docid}.values())
    further += [passage._replace(label=0) for passage in negatives if passage.docid not in answers]
    return [first._replace(label=1.0 if first.label is None else first.label), *further[:NEGATIVES]]


def to_record(row: dict, folder: ImageFolder, source: str, corpus: CorpusCopy) -> dict:
    """Return a row of queries as a record.

    Raises:
      UserError: the query is empty, the corpus lacks a document, or an image, a score or a label is broken.
    """
    passages = _candidates(row)
    positive, *negatives = (corpus.read(passage.docid) for passage in passages)
    _, scores, labels = map(list, zip(*passages, strict=True))
    numbers = read_numbers(scores, labels, len(passages), ("score", "label"))
    return {"query": _query(row, folder), "positive": positive, "negatives": negatives, "source": source, **numbers}


def _query(row: dict, folder: ImageFolder) -> dict:
    column = next((form[1] for form in FORMS if form[1] in row), FORMS[0][1])
    text = "" if row.get(column) is None else row[column]
    if not isinstance(text, str):
        raise UserError(f"{column}: expected a string, not {type(text).__name__}")
    query: dict[str, str | bytes] = {"text": text} if text.strip() else {}
    if image := folder.image(row.get("query_image"), "query_image"):
        query["image"] = image
    if not query:
        raise UserError(f"{column} is empty, and there is no query_image")
    return query


def _passages(column: str, values: object) -> list[Passage]:
    if not isinstance(values, list | None):
        raise UserError(f"{column}: expected a list, not {type(values).__name__}")
    passages = [value if isinstance(value, dict) else {"docid": value} for value in values or ()]
    if wrong := [passage for passage in passages if not isinstance(passage.get("docid"), str | int)]:
        raise UserError(f"{column} has the docid {wrong[0].get('docid')!r}; expected a string or an integer")
    return [Passage(str(passage["docid"]), passage.get("score"), passage.get("label")) for passage in passages]


def _files_of_one_set(directory: Path, content: str, files: Iterable[Path]) -> list[Path]:
    """Return the files, or if some are of the train split, only those. They must be in one folder."""
    files = [file for file in files if file.name.startswith("train")] or list(files)
    folders = sorted({file.parent for file in files})
    if len(folders) != 1:
        state = f"in {folders[0]} and {folders[1]}" if folders else "missing"
        raise UserError(f"{directory}: {content} are {state}; --from is a folder that holds one set of queries and its corpus")
    return files


def _is_hidden(relative: Path) -> bool:
    return any(name.startswith(".") for name in relative.parts)
