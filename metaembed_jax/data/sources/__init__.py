"""The sources of training pairs, by name: a folder of `config.data.dir` each.

Some are made here, of nothing but installed packages (`GENERATED`), the first time they are asked for. All others are prepared once
from files (`READERS`), by `python -m metaembed_jax prepare --source=KIND --from=PATH`; one kind may make several sources.

A source of training pairs is a sequence of records. Where it draws or varies them, `compose(row, epoch, step)` makes the record;
`described(row, epoch, step)` makes the same with (width, height) in place of each image, and reads and draws none. `stored` are
the `Records` that have the same descriptions in every epoch and step, if there are any.

A generated source is a module with `prepare(data_dir) -> marker`, `training(data, seed) -> sequence of records`, with `config.data`
of a run, and `retrieval(data_dir, split) -> Retrieval`. Modules are imported when they are asked for.
"""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from metaembed_jax.config.run import DataConfig
from metaembed_jax.errors import UserError

if TYPE_CHECKING:
    from metaembed_jax.data.sources.records import Retrieval

GENERATED = {"icons": "metaembed_jax.data.sources.icons", "boards": "metaembed_jax.data.sources.boards"}
# Of each kind, the module, the function that finds its parts in a folder (or file), and what --from is.
READERS = {
    "mmeb": ("mmeb", "parts", "the folder of TIGER-Lab/MMEB-train: its original split"),
    "mmeb_diverse": ("mmeb", "diverse_parts", "the same folder: its diverse_instruction split"),
    "mined": ("mmeb", "mined_parts", "a folder of MMEB-train with mined negatives and images inline"),
    "colpali": ("pages", "parts", "the folder of vidore/colpali_train_set"),
    "tevatron": ("tevatron", "parts", "a folder of queries with mined negatives, and of their corpus; the source is named as it"),
    "pairs": ("pairs", "parts", "a .jsonl or .parquet file of your own pairs"),
}


def prepare(name: str, data_dir: str | Path) -> dict:
    """The marker of a prepared source: {"version", "fingerprint", and counts}. What is generated is prepared first, if need be.

    Raises:
      UserError: it is not prepared, and cannot be made of nothing.
    """
    from metaembed_jax.data.sources import records, writing

    if name in GENERATED:
        return importlib.import_module(GENERATED[name]).prepare(data_dir)
    marker = records.read_marker(Path(data_dir) / name, writing.VERSION)
    if marker is None:
        raise UserError(
            f"{Path(data_dir) / name} holds no complete preparation of a source {name!r}: "
            f"run `python -m metaembed_jax prepare --source=KIND --from=PATH --out={data_dir}` (--help says what kinds there are)"
        )
    return marker


def prepare_from(kind: str, path: str | Path, out: str | Path, workers: int, skips: int) -> dict[str, dict]:
    """Prepares all sources that files hold: {name: marker}. What is there already stays.

    Raises:
      UserError: no such kind, files that are not of it, or bad rows; names the first.
    """
    from metaembed_jax.data.sources import writing

    if kind not in READERS:
        raise UserError(f"no source {kind!r}; there are {', '.join([*GENERATED, *READERS])}")
    parts = _reader(kind)(Path(path))
    if taken := [part.name for part in parts if part.name in GENERATED]:
        raise UserError(f"{path}: a source cannot be named {taken[0]!r}, which is generated; rename it")
    return {part.name: writing.write_part(part, Path(out), workers, skips) for part in parts}


def summary(name: str, data_dir: str | Path) -> str:
    """A line about the items of a prepared source: how many, and the largest."""
    from metaembed_jax.data.sources import described, records, writing

    version = importlib.import_module(GENERATED[name]).VERSION if name in GENERATED else writing.VERSION
    return described.summary(records.open_splits(Path(data_dir) / name, version))


def training_records(data: DataConfig, seed: int) -> list[Sequence]:
    """The training split of each entry of `config.data.sources`, for `pipeline.training_batches`; generates what is missing.

    Raises:
      UserError: a source that is not prepared, or `config.data.negatives` of sources that have none.
    """
    from metaembed_jax.data.sources import records, writing

    names = [name for name, *_ in data.sources]
    markers = [prepare(name, data.dir) for name in names]
    if data.negatives and not any(marker.get("negatives") for marker in markers):
        raise UserError(
            f"config.data.negatives={data.negatives}, and no pair of {', '.join(names)} has any: "
            "set it to 0, or each step encodes as many documents in vain"
        )

    def of(name: str) -> Sequence:
        if name in GENERATED:
            return importlib.import_module(GENERATED[name]).training(data, seed)
        return records.open_split(Path(data.dir) / name, writing.VERSION, "train").with_descriptions()

    return [of(name) for name in names]


def with_pairs(names: Sequence[str], data_dir: str | Path, split: str) -> list[str]:
    """Return the sources that have pairs in a split.

    Raises:
      UserError: none has, or as `prepare`.
    """
    # What is generated has pairs in every split, and its marker does not count them.
    present = [name for name in dict.fromkeys(names) if prepare(name, data_dir).get("rows", {}).get(split) != 0]
    if not present:
        raise UserError(
            f"{', '.join(names)}: no source has {split} pairs, which a run is evaluated on: add pairs (of a hundred, about 5 are "
            "for validation and 10 for the test), or a source to config.data.sources"
        )
    return present


def retrieval(name: str, data_dir: str | Path, split: str) -> "Retrieval":
    """The search task of a source's validation or test split, which has pairs.

    Raises:
      UserError: as `prepare`.
    """
    from metaembed_jax.data.sources import records, writing

    if name in GENERATED:
        return importlib.import_module(GENERATED[name]).retrieval(data_dir, split)
    return records.pairs_retrieval(records.open_split(Path(data_dir) / name, writing.VERSION, split))


def _reader(kind: str) -> Callable:
    module, function, _ = READERS[kind]
    return getattr(importlib.import_module(f"metaembed_jax.data.sources.{module}"), function)
