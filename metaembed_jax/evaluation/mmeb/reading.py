"""MMEB's evaluation files, in both published formats, as search tasks.

DIR/{task}/test-*.parquet         qry_text, qry_img_path, tgt_text, tgt_img_path (lists), and in the second format
                                  qry_inst, tgt_inst
DIR/eval_images/{task}/...        the images; paths are relative to eval_images
DIR/eval_images.zip               or the archive of that folder, as published
"""

import hashlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

from metaembed_jax.data.sources.image_files import ImageFolder
from metaembed_jax.data.sources.mmeb import marked_item
from metaembed_jax.data.sources.row_files import check_columns, open_row_files
from metaembed_jax.errors import UserError, shortened
from metaembed_jax.evaluation.mmeb.strings import query_string, target_string
from metaembed_jax.evaluation.mmeb.tasks import Task

COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")


class Questions(NamedTuple):
    """A task as read.

    Attributes:
      queries: items; an image is its path in `images`.
      documents: the distinct items of all queries.
      choices: the numbers of each query's documents; the first is the right one.
      images: reads the paths.
      fingerprint: digest of all above, with the `ImageFolder.stamp` of each image.
    """

    queries: list[dict]
    documents: list[dict]
    choices: list[list[int]]
    images: ImageFolder
    fingerprint: str


def read_task(task: Task, directory: Path) -> Questions:
    """Read one task.

    Raises:
      UserError: files, columns or images are missing, or a row is malformed; names the file and row.
    """
    table = open_row_files(sorted((directory / task.name).glob("test-*.parquet")))
    check_columns(table, COLUMNS)
    images, numbers, stamped = _images(directory), {}, set()
    questions = Questions([], [], [], images, "")
    digest = hashlib.sha256()
    for number, row in enumerate(table.read(0, len(table))):
        try:
            query, targets = _query(task, row), _targets(task, row)
            for target in (query, *(target for _, target in targets)):
                if "image" in target and target["image"] not in stamped:  # most images belong to many queries
                    stamped.add(target["image"])
                    digest.update(repr(images.stamp(target["image"])).encode())
        except UserError as error:
            raise UserError(f"{table.row_name(number)}: {error}") from None
        choices = []
        for key, target in targets:
            if key not in numbers:
                numbers[key] = len(questions.documents)
                questions.documents.append(target)
            choices.append(numbers[key])
        questions.queries.append(query)
        questions.choices.append(list(dict.fromkeys(choices)))
        digest.update(repr((query, targets)).encode())
    return questions._replace(fingerprint=digest.hexdigest()[:16])


def available(directory: Path, tasks: tuple[Task, ...]) -> list[Task]:
    """Return the tasks in a folder.

    Raises:
      UserError: there are none.
    """
    present = [task for task in tasks if any((directory / task.name).glob("test-*.parquet"))]
    if not present:
        raise UserError(f"{directory}: expected {{task}}/test-*.parquet of MMEB; set it to the folder of MMEB-eval")
    return present


def _images(directory: Path) -> ImageFolder:
    archive = directory / "eval_images.zip"
    return ImageFolder(directory / "eval_images", (archive,) if archive.is_file() else ())


def _query(task: Task, row: dict) -> dict:
    text = _string(row, "qry_text")
    if "qry_inst" in row:
        text = query_string(task, _string(row, "qry_inst"), text)
    return marked_item("qry_text", text, row["qry_img_path"], partial(_path, column="qry_img_path"))


def _targets(task: Task, row: dict) -> list[tuple[str, dict]]:
    """Return (key, item) of each target; targets of equal keys are one document."""
    texts, paths = _strings(row, "tgt_text"), _strings(row, "tgt_img_path")
    count = max(len(texts), len(paths))
    if not count:
        raise UserError("tgt_text and tgt_img_path are empty: a query needs targets, the right one first")
    if task.kind in ("t2i", "i2i"):
        texts = texts or [""] * count
    else:
        paths = paths or [""] * count
    if len(texts) != len(paths):
        raise UserError(f"tgt_text has {len(texts)} entries and tgt_img_path {len(paths)}: expected equal numbers")
    captioned = bool(texts[0].strip())
    targets = []
    for text, path in zip(texts, paths, strict=True):
        key = {"t2i": path, "i2i": f"{path}:" + text.strip('"')}.get(task.kind, text)
        string = target_string(task, _string(row, "tgt_inst"), text, captioned) if "tgt_inst" in row else text
        targets.append((key, marked_item("tgt_text", string, path, partial(_path, column="tgt_img_path"))))
    return targets


def _string(row: dict, column: str) -> str:
    """Return the string of a column; empty for null."""
    value = row[column]
    if not isinstance(value, str | None):
        raise UserError(f"{column} is {shortened(value)}; expected a string or null")
    return value or ""


def _strings(row: dict, column: str) -> list[str]:
    """Return the strings of a column, a list of them, or none for null."""
    values = [] if row[column] is None else row[column]
    if not isinstance(values, list) or not all(isinstance(value, str | None) for value in values):
        raise UserError(f"{column} is {shortened(values)}; expected a list of strings, or null")
    return [value or "" for value in values]


def _path(value: object, column: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{column} is {shortened(value)}; expected the path of an image, or null")
    return value
