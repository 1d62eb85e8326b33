"""MMEB-train (`TIGER-Lab/MMEB-train`, arXiv 2410.05160): a folder of subsets, each of them a source.

    DIR/{subset}/{split}-*.parquet      qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path
    DIR/images/{subset}/...             or, as delivered, DIR/images_zip/{subset}.zip

Splits are `original` (kind mmeb) and `diverse_instruction` (kind mmeb_diverse). The variant with mined negatives (kind mined) has
its images inline: qry, qry_image, pos_text, pos_image, neg_text, neg_image_0, neg_image_1, ...

`<|image_1|>` marks the image in a text. Our prompts put the image first, so the mark is removed, with the blanks after it.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from metaembed_jax.data.sources.image_files import ImageFolder, is_absent
from metaembed_jax.data.sources.row_files import RowFiles, check_columns, open_row_files
from metaembed_jax.data.sources.shards import RawSource
from metaembed_jax.errors import UserError, shortened

MARK = "<|image_1|>"


def find_sources(directory: Path, split: str = "original") -> list[RawSource]:
    """Return the subsets of a folder of MMEB-train.

    Raises:
      UserError: there are no subsets, or one lacks a column.
    """
    sources = []
    for subset, rows in _subsets(directory, f"{split}-*.parquet", ("qry", "qry_image_path", "pos_text", "pos_image_path")):
        archive = directory / "images_zip" / f"{subset}.zip"
        folder = ImageFolder(directory, (archive,) if archive.is_file() else ())
        record = partial(to_record, folder=folder, source=subset)
        sources.append(RawSource(subset, rows, record, partial(image_stamps, folder=folder)))
    return sources


def find_diverse_sources(directory: Path) -> list[RawSource]:
    """Return the subsets of the other split, as `find_sources`."""
    return find_sources(directory, "diverse_instruction")


def find_mined_sources(directory: Path) -> list[RawSource]:
    """Return the subsets of a folder of the variant with mined negatives, DIR/{subset}/*.parquet."""
    subsets = _subsets(directory, "*.parquet", ("qry", "qry_image", "pos_text", "pos_image"))
    sources = []
    for subset, rows in subsets:
        folder = ImageFolder(directory / subset)
        record = partial(mined_to_record, folder=folder, source=subset)
        sources.append(RawSource(subset, rows, record, partial(image_stamps, folder=folder)))
    return sources


def image_stamps(row: dict, folder: ImageFolder) -> list[tuple]:
    """Return the stamps of the image files that a row names, in any of its columns of images."""
    return folder.stamps(value for column, value in row.items() if "image" in column)


def _subsets(directory: Path, pattern: str, columns: Sequence[str]) -> list[tuple[str, RowFiles]]:
    """Return (name, rows) of each folder in a folder that has files of a pattern."""
    files = {}
    for file in sorted(directory.glob(f"*/{pattern}")):
        files.setdefault(file.parent.name, []).append(file)
    if not files:
        raise UserError(f"{directory} has no {{subset}}/{pattern}; --from is the folder that the data set was fetched to")
    subsets = [(subset, open_row_files(subset_files)) for subset, subset_files in files.items()]
    for _, rows in subsets:
        check_columns(rows, columns)
    return subsets


def to_record(row: dict, folder: ImageFolder, source: str) -> dict:
    """Return a row of MMEB-train as a record.

    Raises:
      UserError: names the column and what is wrong with it.
    """
    texts, paths = _as_list(row.get("neg_text")), _as_list(row.get("neg_image_path"))
    if texts and paths and len(texts) != len(paths):
        raise UserError(f"neg_text has {len(texts)} entries and neg_image_path {len(paths)}; expected as many")
    count = max(len(texts), len(paths))
    negatives = zip(texts or [""] * count, paths or [""] * count, strict=True)
    return {
        "query": marked_item("qry", row["qry"], row["qry_image_path"], partial(folder.image, column="qry_image_path")),
        "positive": marked_item("pos_text", row["pos_text"], row["pos_image_path"], partial(folder.image, column="pos_image_path")),
        "negatives": _negatives(negatives, partial(folder.image, column="neg_image_path")),
        "source": source,
    }


def mined_to_record(row: dict, folder: ImageFolder, source: str) -> dict:
    """Return a row with its images inline as a record.

    Raises:
      UserError: as `to_record`.
    """
    images = [row[f"neg_image_{number}"] for number in range(len(row)) if f"neg_image_{number}" in row]
    texts = _as_list(row.get("neg_text"))
    count = max(len(texts), len(images))
    texts, images = texts + [""] * (count - len(texts)), images + [None] * (count - len(images))
    return {
        "query": marked_item("qry", row["qry"], row["qry_image"], partial(folder.image, column="qry_image")),
        "positive": marked_item("pos_text", row["pos_text"], row["pos_image"], partial(folder.image, column="pos_image")),
        "negatives": _negatives(zip(texts, images, strict=True), partial(folder.image, column="neg_image")),
        "source": source,
    }


def _negatives(values: Iterable[tuple], read: Callable) -> list[dict]:
    """Return the items of texts and images; a negative without both is left out, as the set pads its lists."""
    return [marked_item("neg_text", text, image, read) for text, image in values if not (text in (None, "") and is_absent(image))]


def marked_item(column: str, text: str | None, image: object, read: Callable) -> dict:
    """Return the item of a text, without the mark of its image, and an image.

    Args:
      read: returns the image of the item, given `image`.

    Raises:
      UserError: a mark without an image, an image without a mark, or neither text nor image.
    """
    text = "" if text is None else text
    if not isinstance(text, str):
        raise UserError(f"{column}: expected a string, not {type(text).__name__}")
    with_image = not is_absent(image)
    if (MARK in text) != with_image:
        raise UserError(
            f"{column} {shortened(text)} has {'the mark' if MARK in text else 'no mark'} {MARK}, and "
            f"{'an' if with_image else 'no'} image next to it"
        )
    item = {"image": read(image)} if with_image else {}
    before, _, after = text.partition(MARK)
    if MARK in after:
        raise UserError(f"{column} {shortened(text)} has the mark {MARK} twice; an item has one image")
    words = before + after.lstrip() if with_image else text
    if words.strip():
        item["text"] = words
    if not item:
        raise UserError(f"{column} is empty, and has no image")
    return item


def _as_list(value: object) -> list:
    """Return the negatives of a column, which has none, one, or a list of them."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
