"""The rows of a mined source, for its preparation: training pairs with their negatives, then the held-out pairs as they are."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from metaembed_jax.data.run_items import item_of
from metaembed_jax.data.sources.candidates import NUMBERS, further_positives


@dataclasses.dataclass(frozen=True)
class MinedRows:
    """Records as rows. Can be pickled, for worker processes.

    Attributes:
      name: the source of the pairs.
      training: its training pairs.
      held_out: those of its other splits.
      negatives: a file of [rows, most negatives, 2]: row of `training` and number in the pair of each negative, -1 for none.
    """

    name: str
    training: Sequence[dict]
    held_out: tuple[Sequence[dict], ...]
    negatives: Path

    @property
    def files(self) -> tuple[Path, ...]:
        """No files; the key of the source tells its rows from others."""
        return ()

    def __len__(self) -> int:
        return len(self.training) + sum(map(len, self.held_out))

    def row_name(self, row: int) -> str:
        """Return the name of a row for errors."""
        return f"source {self.name!r}, row {row}"

    def read(self, start: int, stop: int) -> Iterator[dict]:
        """Yield rows start .. stop-1."""
        for row in range(start, stop):
            if row < len(self.training):
                yield self._mined(row)
                continue
            row -= len(self.training)
            for pairs in self.held_out:
                if row < len(pairs):
                    yield pairs[row]
                    break
                row -= len(pairs)

    def _mined(self, row: int) -> dict:
        """Return a pair with its further positives, then its mined negatives."""
        record = self.training[row]
        items = [item_of(self.training[other], number) for other, number in self._places[row].tolist() if other >= 0]
        numbers = {name: _kept_numbers(record, name, len(items)) for name in NUMBERS if name in record}
        return record | {"negatives": [*further_positives(record), *items], **numbers}

    @functools.cached_property
    def _places(self) -> Int[np.ndarray, "R K 2"]:
        return np.load(self.negatives, mmap_mode="r")

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_places"}


def as_record(row: dict) -> dict:
    """Return a row; it is a record already."""
    return row


def no_images(row: dict) -> list[tuple]:
    """Return no stamps: a row names no image files."""
    return []


def _kept_numbers(record: dict, name: str, mined: int) -> list[float]:
    """Return the numbers of the positive, of further positives, and of mined negatives, whose label is 0 and score is missing."""
    labels = record.get("labels", [1.0])
    values = record[name]
    kept = [value for value, label in zip(values[1:], labels[1:], strict=False) if label > 0]
    return [values[0], *kept, *[0.0 if name == "labels" else float("nan")] * mined]
