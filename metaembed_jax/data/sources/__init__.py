"""The sources that are prepared and read here, by name.

A source is a module with `prepare(data_dir) -> marker`, `training(data_dir, config) -> sequence of records` and
`retrieval(data_dir, split) -> Retrieval`. It is imported when it is asked for.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from metaembed_jax.errors import UserError

SOURCES = {"icons": "metaembed_jax.data.sources.icons", "boards": "metaembed_jax.data.sources.boards"}


def source(name: str) -> ModuleType:
    """The module of a source. Raises UserError, naming those that there are, for any other name."""
    if name not in SOURCES:
        raise UserError(f"no source {name!r}; there are {', '.join(SOURCES)}")
    return importlib.import_module(SOURCES[name])


def prepare(name: str, data_dir: str | Path) -> dict:
    """Prepares a source in `data_dir`/`name` unless it is there already.

    Returns:
      Its marker: {"version", "fingerprint", and counts}.
    """
    return source(name).prepare(data_dir)


def training_records(config: ConfigDict) -> list[Sequence]:
    """The training split of each entry of `config.data.sources`, for `pipeline.training_batches`; prepares what is missing."""
    for name, *_ in config.data.sources:
        prepare(name, config.data.dir)
    return [source(name).training(config.data.dir, config) for name, *_ in config.data.sources]


def retrieval(name: str, data_dir: str | Path, split: str):
    """The search task of a source's validation or test split: `records.Retrieval`."""
    return source(name).retrieval(data_dir, split)
