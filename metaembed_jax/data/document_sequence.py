"""Documents to search, whatever they are read from."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from jaxtyping import UInt64

from metaembed_jax.data.left_out import LeftOut


class Documents(Sequence):
    """Documents in a fixed order. `documents[i]` is an item for `MetaEmbed.encode_document`. Can be pickled.

    Attributes:
      files: those that are read, without the images that a table names.
      left_out: files that cannot be opened, whose documents are left out.
    """

    files: tuple[Path, ...]
    left_out: Sequence[LeftOut] = ()

    def __getitem__(self, number):
        """Return {"text": str, "image": PIL image or encoded bytes}, either or both; for a slice, a list of them.

        Raises:
          UserError: a document cannot be read; names its file, and its page or row.
        """
        numbers = range(len(self))[number]
        return [self._item(number) for number in numbers] if isinstance(numbers, range) else self._item(numbers)

    def drawn_at(self, pixels: int) -> Self:
        """Return these documents with pages of PDF files drawn at about so many pixels, as `PromptProcessor.page_pixels` gives."""
        return self

    @property
    def unread_pages(self) -> int:
        """The number of pages that are no documents: all but the first of a TIFF that a table names, of the rows read so far."""
        return 0

    @abstractmethod
    def ids(self) -> list[str]:
        """Return the ids of all documents."""

    @abstractmethod
    def stamps(self) -> UInt64[np.ndarray, " N"]:
        """Return a number for each document that changes when its file, or its row or the image that it names, changes.

        Files are told apart by path, size and time; no image or PDF file is opened.
        """

    @abstractmethod
    def id_of(self, number: int) -> str:
        """Return the id of a document."""

    @abstractmethod
    def metadata(self, number: int) -> dict:
        """Return the document's id, path (of the file that shows it), page (from 1) and text, None where absent.

        Of a table, also return its further columns.
        """

    @abstractmethod
    def item_name(self, number: int) -> str:
        """Return the name of a document for errors: its file, and the page or row."""

    @abstractmethod
    def _item(self, number: int) -> dict: ...
