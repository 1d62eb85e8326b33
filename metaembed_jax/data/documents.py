"""What is to be searched: a folder of images and PDF files, or a table of texts and images, read one by one when needed.

    FOLDER/**              images, one document each, and PDF files, one document a page
    items.jsonl, .parquet  rows with id, text, image: any of them may be absent, but not text and image together

In a folder documents are in natural order (page2 before page10, a folder where its name stands among the files). Hidden files
and folders are passed over. What is no image or PDF, and links that lead out of the folder or to a folder, are left out, and one
line says how many. A file that should be readable and is not stops everything: encrypted, broken or empty PDF files at once, a
broken image when it is read.
"""

import os
import re
from abc import abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path, PurePath

from metaembed_jax.data.pdf import PdfReader
from metaembed_jax.data.sources.files import ImageFolder, read_image_file
from metaembed_jax.data.sources.tables import Table, new_id, open_table
from metaembed_jax.errors import UserError
from metaembed_jax.files import local_path
from metaembed_jax.inputs.images import image_size, open_image

IMAGES = frozenset(".avif .bmp .gif .jpeg .jpg .png .tif .tiff .webp".split())  # of those with several pictures, the first one
TABLES = frozenset((".jsonl", ".parquet"))
COLUMNS = {"id", "text", "image"}


class Documents(Sequence):
    """Documents in a fixed order. `documents[i]` is what `MetaEmbed.encode_document` takes. Survives pickling.

    Attributes:
      files: what they are read from, but for the images that a table names.
    """

    files: tuple[Path, ...]

    def __getitem__(self, number):
        """{"text": str, "image": PIL image or encoded bytes}, with either or both; of a slice, a list of them.

        Raises:
          UserError: it cannot be read; names the file, and its page or row.
        """
        chosen = range(len(self))[number]
        return [self._item(one) for one in chosen] if isinstance(chosen, range) else self._item(chosen)

    @abstractmethod
    def about(self, number: int) -> dict:
        """{"id": str, unlike all others, "path": str or None, of the file that shows it, "page": int from 1, or None, "text": str
        or None}.
        """

    @abstractmethod
    def item_name(self, number: int) -> str:
        """The name of a document in errors: its file, and the page or row."""

    @abstractmethod
    def _item(self, number: int) -> dict: ...


def open_documents(path: str | Path) -> Documents:
    """The documents of a folder, of an image or PDF file, or of a table.

    Raises:
      UserError: there is none, a PDF or table cannot be read, or an id is there twice; names the file, and its row.
    """
    path = local_path(path)
    if path.is_dir():
        files, left_out = find_files(path)
        if left_out:
            print(f"{path}: left out {', '.join(f'{count:,} {what}' for what, count in sorted(left_out.items()))}", flush=True)
        if not files:
            raise UserError(f"{path}: has no image and no PDF file in it")
        return FolderDocuments(path, files)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix.lower() in TABLES:
        return TableDocuments(open_table([path]))
    if path.suffix.lower() not in IMAGES | {".pdf"}:
        raise UserError(f"{path}: is no image, PDF file or table ({', '.join(sorted(IMAGES | TABLES | {'.pdf'}))})")
    return FolderDocuments(path.parent, [path])


class FolderDocuments(Documents):
    """Images and pages of PDF files. An image's id is its path in the folder; a page's has #page=N behind it, as links have."""

    def __init__(self, root: Path, files: Sequence[Path]):
        self.root, self.files, self.reader = root, tuple(files), PdfReader()
        counts, wrong = [], []
        for file in files:
            try:
                counts.append(self.reader.count(file) if _is_pdf(file) else 1)
            except UserError as error:
                wrong.append(error)
        if wrong:
            raise UserError(f"{wrong[0]}" + (f" (and {len(wrong) - 1:,} other files)" if len(wrong) > 1 else ""))
        self.starts = list(accumulate(counts, initial=0))

    def __len__(self) -> int:
        return self.starts[-1]

    def about(self, number: int) -> dict:
        file, page = self._find(number)
        name = file.relative_to(self.root).as_posix()
        return {"id": f"{name}#page={page}" if page else name, "path": str(file), "page": page, "text": None}

    def item_name(self, number: int) -> str:
        file, page = self._find(number)
        return f"{file}, page {page}" if page else str(file)

    def described(self, number: int) -> dict:
        """The document with (width, height) in place of its image, which is not decoded."""
        file, page = self._find(number)
        return {"image": self.reader.size(file, page) if page else image_size(file, str(file))}

    def _item(self, number: int) -> dict:
        file, page = self._find(number)
        return {"image": self.reader.page(file, page) if page else open_image(read_image_file(file), str(file))}

    def _find(self, number: int) -> tuple[Path, int | None]:
        number = range(len(self))[number]
        place = bisect_right(self.starts, number) - 1
        file = self.files[place]
        return file, number - self.starts[place] + 1 if _is_pdf(file) else None


class TableDocuments(Documents):
    """Rows of a table. A row's id is in its column `id`; where there is no such column, it is the row's number from 0."""

    def __init__(self, table: Table):
        columns = table.columns()
        if not columns & {"text", "image"} or columns - COLUMNS:
            raise UserError(f"{table.files[0]}: has {', '.join(sorted(columns))}; there are id, text, image")
        self.table, self.files, self.folder, self.ids = table, table.files, ImageFolder(table.files[0].parent), None
        if "id" in columns:
            rows, seen = table.read(0, len(table), columns=("id",)), {}
            self.ids = [new_id(row.get("id"), "id", seen, table, number) for number, row in enumerate(rows)]

    def __len__(self) -> int:
        return len(self.table)

    def about(self, number: int) -> dict:
        number = range(len(self))[number]
        row = self._row(number)
        image, text = row.get("image"), row.get("text")
        path = str(self.folder.root / image) if isinstance(image, str) and image else None
        return {"id": self.ids[number] if self.ids else str(number), "path": path, "page": None, "text": text or None}

    def item_name(self, number: int) -> str:
        return self.table.place(number)

    def _item(self, number: int) -> dict:
        row = self._row(number)
        try:
            if unknown := row.keys() - (COLUMNS if self.ids else COLUMNS - {"id"}):
                raise UserError(f"has {', '.join(sorted(unknown))}, unlike the first row, or beside id, text, image")
            return self.folder.item("document", row.get("text"), row.get("image"))
        except UserError as error:
            raise UserError(f"{self.table.place(number)}: {error}") from None

    def _row(self, number: int) -> dict:
        return next(self.table.read(number, number + 1))


def find_files(root: Path) -> tuple[list[Path], Counter]:
    """The images and PDF files under a folder, in natural order; and how many files of each kind are left out.

    Raises:
      UserError: a folder that cannot be read.
    """

    def refuse(error: OSError):
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    found, left_out = [], Counter()
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        left_out.update({"links to folders": len(linked)} if linked else {})
        for name in names:
            if not name.startswith("."):
                file = Path(folder, name)
                reason = _why_not(file, root)
                found += [] if reason else [file]
                left_out.update([reason] if reason else [])
    return sorted(found, key=lambda file: natural_order(file.relative_to(root))), left_out


def natural_order(path: PurePath) -> tuple:
    """A key to sort paths by: numbers in names by their value, letters regardless of their case."""
    parts = [re.split("([0-9]+)", part) for part in path.parts]  # words at even places, numbers at odd ones
    return [[int(x) if place % 2 else x.casefold() for place, x in enumerate(part)] for part in parts], path.parts


def _why_not(file: Path, root: Path) -> str:
    """What a file is counted as that is left out; empty if it is not."""
    if file.suffix.lower() not in IMAGES | {".pdf"}:
        return f"files with the ending {file.suffix.lower()}" if file.suffix else "files without an ending"
    if not file.is_file():
        return "links and pipes that lead to no file"
    if not file.resolve().is_relative_to(root.resolve()):
        return "links out of the folder"
    try:
        file.name.encode()
    except UnicodeEncodeError:
        return "files whose names are no text"
    return ""


def _is_pdf(file: Path) -> bool:
    return file.suffix.lower() == ".pdf"
