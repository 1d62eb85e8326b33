"""Documents that rows name by their ids, copied once into a file with random access.

    corpus.bin        an image, then a text, document by document
    corpus.json       {id: [row in the corpus, first byte, bytes of the image, bytes of the text]}; written last
    corpus-images.json    the paths of image files that documents name; stays in the complete source

The rows of a shard name documents from all over a corpus, which is larger than memory. Parquet reads a document only together with
its row group, so each shard would read most of the corpus. The copy reads it once, in order.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from metaembed_jax.data.sources.image_files import ImageFolder, check_image, image_path
from metaembed_jax.data.sources.row_files import RowFiles, Rows, read_each, unique_id
from metaembed_jax.data.stamps import file_stamp, stamp_of
from metaembed_jax.errors import UserError
from metaembed_jax.files import write_bytes, write_json

CONTENT, SPANS, IMAGES = "corpus.bin", "corpus.json", "corpus-images.json"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Rows of documents, and the ids by which other rows name them.

    Attributes:
      rows: the documents, with the columns docid, image (see `ImageFolder.load`) and text; one of the last two may be absent.
      ids: returns the ids of the documents that a row names; raises UserError for a malformed row.
    """

    rows: RowFiles
    ids: Callable[[dict], Sequence[str]]

    def copy(self, rows: Rows, folder: Path, name: str) -> "CorpusCopy":
        """Copy the documents that rows name, unless they are copied already.

        Args:
          rows: rows with the column query_id.
          name: name of the source, for the progress bars.

        Raises:
          UserError: an id occurs twice, or a document is malformed; names file and row.
        """
        if not (folder / SPANS).is_file():
            named = self._named(rows, name)
            spans, paths = self._write(named, folder / CONTENT, name)
            write_json(folder / IMAGES, paths)
            write_bytes(folder / SPANS, json.dumps(spans).encode())
        return CorpusCopy(folder, self.rows)

    def stamp(self, folder: Path) -> str:
        """Return a stamp of the files that were copied to a folder, as they are now; empty if the folder does not name them.

        It depends on size and time of the corpus's files and of the image files that copied documents name.
        """
        if not (folder / IMAGES).is_file():
            return ""
        files = [file_stamp(file) for file in self.rows.files]
        return f"{stamp_of((files, self._folder.stamps(json.loads((folder / IMAGES).read_text())))):016x}"

    def _named(self, rows: Rows, name: str) -> set[str]:
        named, seen = set(), {}
        for number, row in tqdm(read_each(rows.read, 0, len(rows)), f"{name}: queries", len(rows), unit="row", mininterval=0.5):
            if isinstance(row, UserError):  # raised again, or skipped, when the row is written
                continue
            unique_id(row.get("query_id"), "query_id", seen, rows, number)
            try:
                named.update(self.ids(row))
            except UserError:  # raised again, or skipped, when the row is written
                continue
        return named

    def _write(self, named: set[str], path: Path, name: str) -> tuple[dict[str, tuple[int, int, int, int]], list[str]]:
        """Copy documents, and return their spans and the paths of the image files that they name."""
        spans, paths, seen, rows = {}, [], {}, self.rows.read(0, len(self.rows))
        try:
            with path.open("wb") as file:
                for number, row in enumerate(tqdm(rows, f"{name}: corpus", len(self.rows), unit="row", mininterval=0.5)):
                    docid = unique_id(row.get("docid"), "docid", seen, self.rows, number)
                    if docid in named:
                        image, text = self._content(row, number)
                        spans[docid] = number, file.tell(), len(image), len(text)
                        paths += filter(None, [image_path(row.get("image"))])
                        file.write(image + text)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; free space or choose another --out") from error
        return spans, paths

    @property
    def _folder(self) -> ImageFolder:
        return ImageFolder(self.rows.files[0].parent)

    def _content(self, row: dict, number: int) -> tuple[bytes, bytes]:
        text = "" if row.get("text") is None else row["text"]
        try:
            if not isinstance(text, str):
                raise UserError(f"text: expected a string, not {type(text).__name__}")
            return self._folder.load(row.get("image"), "image")[0], text.encode()
        except UserError as error:
            raise UserError(f"{self.rows.row_name(number)}: {error}") from None


@dataclasses.dataclass(frozen=True)
class CorpusCopy:
    """The documents that `Corpus.copy` has copied to a folder. Can be pickled."""

    folder: Path
    rows: RowFiles

    def read(self, docid: str) -> dict:
        """Return a document as an item.

        Raises:
          UserError: the corpus lacks the id, or the document is empty or has a broken image.
        """
        if docid not in self._spans:
            raise UserError(f"names the document {docid!r}, which the corpus lacks ({self.rows.files[0]}, ...)")
        row, first, image_bytes, text_bytes = self._spans[docid]
        with (self.folder / CONTENT).open("rb") as file:
            file.seek(first)
            image, text = file.read(image_bytes), file.read(text_bytes).decode()
        name = f"document {docid!r} ({self.rows.row_name(row)})"
        item: dict[str, str | bytes] = {"text": text} if text.strip() else {}
        if image:
            item["image"] = check_image(image, name)
        if not item:
            raise UserError(f"the {name} has neither text nor image")
        return item

    @functools.cached_property
    def _spans(self) -> dict[str, list[int]]:
        return json.loads((self.folder / SPANS).read_text())


def remove_copy(folder: Path) -> None:
    """Remove the copy of a corpus from a folder, if it has one."""
    for name in (SPANS, CONTENT):
        (folder / name).unlink(missing_ok=True)
