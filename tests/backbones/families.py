"""The data of a family for the tests of all families: its `RECORD` in `tests/backbones/<family>/record.py`."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metaembed_jax.backbones.family import FAMILIES


class Record(NamedTuple):
    """A small model, its items, and the reference.

    Attributes:
      write: makes a directory as transformers saves it: random weights (norms, biases and gates too), tokenizer.json and
        preprocessor; several layers of each kind.
      queries, documents: items: texts, images of different shapes, both; at least eight of each.
      tokens, patches: of a shape class that holds all of them.
      pixels: least and most of an image, for `config.data`.
      vectors: (directory of an export, items, side, model) -> unit vectors, by stock transformers from the strings of prompts and
        Meta Tokens, all items in one left-padded batch. The model is another than that of the directory, if it is given.
      lora: `config.model.trained` of the recipe.
    """

    write: Callable[[Path], None]
    queries: Sequence
    documents: Sequence
    tokens: int
    patches: int
    pixels: tuple[int, int]
    vectors: Callable[..., np.ndarray]
    lora: Sequence[tuple[str, str]]


def record(model_type: str) -> Record:
    """Return the record of a family."""
    return importlib.import_module(f"tests.backbones.{FAMILIES[model_type]}.record").RECORD
