"""Documents that rows name by their ids: copied once, from tables into a file where each is found at once.

    corpus.bin        an image, then a text, document by document
    corpus.json       {id: [row in the table, first byte, bytes of the image, bytes of the text]}; written last

The rows of one shard name documents from all over a corpus, which is larger than memory. Parquet gives a document only together
with its row group, so that every shard would read about all of the corpus; this way it is read once, in order.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from metaembed_jax.data.sources.files import check_image, inline
from metaembed_jax.data.sources.tables import Table, new_id
from metaembed_jax.errors import UserError
from metaembed_jax.files import write_bytes

CONTENT, PLACES = "corpus.bin", "corpus.json"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A table of documents, and how rows of another table name them.

    Attributes:
      table: has the columns docid, image (as `inline` takes it) and text; one of the last two may be absent.
      named: the ids of the documents that a row needs. Raises UserError for a row that makes no sense.
    """

    table: Table
    named: Callable[[dict], Sequence[str]]

    def copy(self, rows: Table, folder: Path, name: str) -> "Copied":
        """Copies the documents that rows need; already done, does nothing.

        Args:
          rows: have the column query_id.
          name: of the source, for the progress bars.

        Raises:
          UserError: an id twice, in one table or the other, or a document that is none; names file and row.
        """
        if not (folder / PLACES).is_file():
            needed = self._needed(rows, name)
            write_bytes(folder / PLACES, json.dumps(self._write(needed, folder / CONTENT, name)).encode())
        return Copied(folder, self.table)

    def _needed(self, rows: Table, name: str) -> set[str]:
        needed, seen = set(), {}
        for number, row in enumerate(tqdm(rows.read(0, len(rows)), f"{name}: queries", len(rows), unit="row", mininterval=0.5)):
            new_id(row.get("query_id"), "query_id", seen, rows, number)
            try:
                needed.update(self.named(row))
            except UserError:  # it is said, or skipped, when the row is written
                continue
        return needed

    def _write(self, needed: set[str], path: Path, name: str) -> dict[str, tuple[int, int, int, int]]:
        places, seen, rows = {}, {}, self.table.read(0, len(self.table))
        try:
            with path.open("wb") as file:
                for number, row in enumerate(tqdm(rows, f"{name}: corpus", len(self.table), unit="row", mininterval=0.5)):
                    docid = new_id(row.get("docid"), "docid", seen, self.table, number)
                    if docid in needed:
                        image, text = self._content(row, number)
                        places[docid] = number, file.tell(), len(image), len(text)
                        file.write(image + text)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; free space or choose another --out") from error
        return places

    def _content(self, row: dict, number: int) -> tuple[bytes, bytes]:
        image, text = inline(row.get("image")), row.get("text") or ""
        if not isinstance(image, bytes) or not isinstance(text, str):
            kinds = f"image is a {type(image).__name__} and text a {type(text).__name__}"
            raise UserError(f"{self.table.place(number)}: {kinds}; expected the bytes of an image, and a text")
        return image, text.encode()


@dataclasses.dataclass(frozen=True)
class Copied:
    """The documents that `Corpus.copy` left in a folder. Survives pickling."""

    folder: Path
    table: Table

    def read(self, docid: str) -> dict:
        """A document as an item.

        Raises:
          UserError: there is none of this id, it is empty, or its image is broken.
        """
        if docid not in self._places:
            raise UserError(f"names the document {docid!r}, and the corpus has none of this docid ({self.table.files[0]}, ...)")
        row, first, image_bytes, text_bytes = self._places[docid]
        with (self.folder / CONTENT).open("rb") as file:
            file.seek(first)
            image, text = file.read(image_bytes), file.read(text_bytes).decode()
        where = f"document {docid!r} ({self.table.place(row)})"
        found = {"text": text} if text.strip() else {}
        if image:
            found["image"] = check_image(image, f"of {where}")
        if not found:
            raise UserError(f"the {where} has neither text nor image")
        return found

    @functools.cached_property
    def _places(self) -> dict[str, list[int]]:
        return json.loads((self.folder / PLACES).read_text())


def remove_copy(folder: Path) -> None:
    """Removes what `Corpus.copy` left in a folder, if it did."""
    for name in (PLACES, CONTENT):
        (folder / name).unlink(missing_ok=True)
