"""The files of a folder that are documents, in natural order."""

import os
import re
from collections import Counter
from pathlib import Path, PurePath

from metaembed_jax.errors import UserError
from metaembed_jax.inputs.image_formats import ENDINGS

DOCUMENT_ENDINGS = ENDINGS | {".pdf"}


def find_files(root: Path) -> tuple[list[Path], Counter]:
    """Return the images and PDF files in a folder, in natural order, and the number of others of each kind.

    Raises:
      UserError: a folder cannot be read.
    """

    def refuse(error: OSError):
        raise UserError(f"{error.filename} cannot be read ({error.strerror})")

    files, not_read, real = [], Counter(), root.resolve()
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        not_read.update({"links to folders": len(links)} if links else {})
        for name in names:
            if not name.startswith("."):
                file = Path(folder, name)
                kind = _why_not_read(file, real)
                files += [] if kind else [file]
                not_read.update([kind] if kind else [])
    return sorted(files, key=lambda file: natural_order(file.relative_to(root))), not_read


def natural_order(path: PurePath) -> tuple:
    """Return a key that sorts paths by the values of numbers in their names, and by letters of either case."""
    split_names = [re.split("([0-9]+)", name) for name in path.parts]  # text at even indices, numbers at odd ones
    return [[int(x) if index % 2 else x.casefold() for index, x in enumerate(name)] for name in split_names], path.parts


def _why_not_read(file: Path, root: Path) -> str:
    """Return the kind of file because of which a file is not read; empty if it is a document.

    Args:
      root: the folder of all documents, without links.
    """
    if file.suffix.lower() not in DOCUMENT_ENDINGS:
        return f"files with the ending {file.suffix.lower()}" if file.suffix else "files without an ending"
    is_link = file.is_symlink()
    if not file.is_file():
        return "links and pipes that lead to no file"
    if is_link and not file.resolve().is_relative_to(root):
        return "links out of the folder"
    try:
        file.name.encode()
    except UnicodeEncodeError:
        return "files whose names are not valid Unicode"
    return ""
