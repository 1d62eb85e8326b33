"""Queries and corpora of mteb's retrieval tasks, as items to encode.

An instruction that the data has for a query is part of the query's text. mteb's prompts for whole tasks are not used: they are for
models that follow instructions. Other late-interaction models are evaluated without them too, and this model's
prompts add "Query: ".
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metaembed_jax.data.sources.image_files import image_content, is_absent, read_image_file
from metaembed_jax.errors import UserError

TEXT_COLUMNS = {"query": ("text", "instruction"), "document": ("text", "title")}


class TaskItems(Sequence):
    """Rows of a `datasets.Dataset` with an `id` and a `text`, an `image` or both, read on access.

    Args:
      table: the rows.
      side: "query" or "document".
      modalities: modalities of the task on this side; other columns are not read.
      name: name of the rows, for errors.

    Raises:
      UserError: the table has none of the columns.
    """

    def __init__(self, table: Any, side: str, modalities: Sequence[str], name: str):
        from datasets import Image

        present = [modality for modality in ("text", "image") if modality in modalities and modality in table.column_names]
        if not present:
            raise UserError(f"{name} has the columns {', '.join(table.column_names)}; expected {' or '.join(modalities)}")
        columns = [column for column in TEXT_COLUMNS[side] if "text" in present and column in table.column_names]
        if "image" in present:
            if not isinstance(table.features["image"], Image):
                raise UserError(f"{name}: the column image holds {table.features['image']}; expected images")
            table, columns = table.cast_column("image", Image(decode=False)), [*columns, "image"]
        self.ids: list[str] = list(table["id"])
        self.side, self.name = side, name
        self._table = table.select_columns(columns)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> dict:
        row, item = self._table[int(number)], {}
        if row.get("text") is not None:
            item["text"] = text_of(row, self.side)
        if not is_absent(row.get("image")):
            item["image"] = self._image(row["image"], number)
        return item

    def item_name(self, number: int) -> str:
        """Return the name of an item for errors."""
        return f"item {self.ids[number]}"

    def fingerprint(self) -> str:
        """Return a digest of the content of all items in order, without their ids."""
        digest = hashlib.sha256()
        for item in self:
            for content in (item.get("text", "").encode("utf-8", "surrogatepass"), item.get("image", b"")):
                digest.update(len(content).to_bytes(8) + content)
        return digest.hexdigest()

    def _image(self, image: object, number: int) -> bytes:
        """Return the bytes of an image, which `datasets` stores in the row or in a file."""
        try:
            content = image_content(image, "image")
            return content if isinstance(content, bytes) else read_image_file(Path(content))
        except UserError as error:
            raise UserError(f"{self.name}, {self.item_name(number)}: {error}") from None


def items_of(table: Any, side: str, metadata: Any) -> TaskItems:
    """Return the queries or the corpus of a task, by its metadata.

    Raises:
      UserError: as `TaskItems`.
    """
    from mteb.types import PromptType

    kind, name = {"query": (PromptType.query, "queries"), "document": (PromptType.document, "corpus")}[side]
    return TaskItems(table, side, metadata.get_modalities(kind), f"{metadata.name}, {name}")


def text_of(row: dict, side: str) -> str:
    """Return the text of a row as mteb's own models read it: title and text, text and instruction, or turns of a conversation."""
    text = row["text"]
    if side == "document":
        return f"{row.get('title') or ''} {text}".strip()
    instruction = row.get("instruction")
    if isinstance(text, list):
        turns = "; ".join(turn if isinstance(turn, str) else f"{turn['role']}: {turn['content']}" for turn in text)
        return turns if instruction is None else f"{instruction} {turns}"
    return text if instruction is None else f"{text} {instruction}"
