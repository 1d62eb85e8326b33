"""The sources of training pairs, by name. Each has a folder in `config.data.dir`.

`GENERATED` sources are made from installed packages when they are first needed. All others are prepared once from files of a kind
(`READERS`), by `python -m metaembed_jax prepare --source=KIND --from=PATH`; files of one kind may hold several sources.

A source of training pairs is a sequence of records (see `records`), and may also have

    compose(row, epoch, step)     the record, where the source draws or varies it; a pure function
    describe(row, epoch, step)    the same record with (width, height) in place of each image, without drawing or reading it
    stored                        the `Records` with the same descriptions, where they are the same in every epoch and step
    answering(query)              the rows whose positives answer a query, where rows with an equal query are not all of them

A module of a generated source has `prepare(data_dir) -> marker`, `training(data, seed) -> source`, where data is `config.data` of a
run, `fixed_training(data_dir) -> source`, a fixed set of its training pairs, in which negatives can be mined, and
`retrieval(records) -> Retrieval` of its validation or test split. Modules are imported when they are needed.
"""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from metaembed_jax.config.run import DataConfig
from metaembed_jax.errors import UserError

if TYPE_CHECKING:
    from metaembed_jax.data.sources.records import Records, Retrieval

GENERATED = {"icons": "metaembed_jax.data.sources.icons", "boards": "metaembed_jax.data.sources.boards"}
ONLY_OF = {"augment": "icons", "curriculum": "boards"}  # keys of config.data that one source reads
# For each kind, its module, the function that finds its sources in a folder (or file), and the meaning of --from.
READERS = {
    "mmeb": ("mmeb", "find_sources", "the folder of TIGER-Lab/MMEB-train: its original split"),
    "mmeb_diverse": ("mmeb", "find_diverse_sources", "the same folder: its diverse_instruction split"),
    "mined": ("mmeb", "find_mined_sources", "a folder of MMEB-train with mined negatives and images inline"),
    "colpali": ("colpali", "find_sources", "the folder of vidore/colpali_train_set"),
    "tevatron": ("tevatron", "find_sources", "a folder of queries with mined negatives, and of their corpus; it names the source"),
    "pairs": ("pairs", "find_sources", "a .jsonl or .parquet file of your own pairs; it names the source"),
}


def prepare(name: str, data_dir: str | Path) -> dict:
    """Return the marker of a prepared source: {"version", "fingerprint", and counts}. A generated source is prepared if it is not.

    Raises:
      UserError: another source is not prepared.
    """
    from metaembed_jax.data.sources import preparation, records

    if name in GENERATED:
        return importlib.import_module(GENERATED[name]).prepare(data_dir)
    marker = records.read_marker(Path(data_dir) / name, preparation.VERSION)
    if marker is None:
        raise UserError(
            f"{(Path(data_dir) / name).absolute()} holds no complete preparation of a source {name!r}: "
            f"run `python -m metaembed_jax prepare --source=KIND --from=PATH --out={data_dir}` (--help lists the kinds)"
        )
    return marker


def prepare_from(kind: str, path: str | Path, out: str | Path, workers: int, skips: int) -> dict[str, dict]:
    """Prepare all sources that files hold, except those that are prepared.

    Returns:
      The marker of each source, by name.

    Raises:
      UserError: the kind is unknown, the files are not of it, or rows are bad; names the first.
    """
    from metaembed_jax.data.sources import preparation

    if kind not in READERS:
        raise UserError(f"unknown source {kind!r}; allowed: {', '.join([*GENERATED, *READERS])}")
    raw_sources = _find_sources(kind)(Path(path))
    if taken := [source.name for source in raw_sources if source.name in GENERATED]:
        raise UserError(f"{path}: the name {taken[0]!r} is that of a generated source; rename it")
    return {source.name: preparation.prepare_source(source, Path(out), workers, skips) for source in raw_sources}


def summary(name: str, data_dir: str | Path) -> str:
    """Return a line about the items of a prepared source: their numbers, the largest image and the longest text."""
    from metaembed_jax.data.sources import descriptions, preparation, records

    version = importlib.import_module(GENERATED[name]).VERSION if name in GENERATED else preparation.VERSION
    splits = records.open_splits(Path(data_dir) / name, version)
    return descriptions.summarize(split.describe(row) for split in splits for row in range(len(split)))


def training_records(data: DataConfig, seed: int) -> list[Sequence]:
    """Open the training split of each entry of `config.data.sources`; generated sources are prepared if they are not.

    Raises:
      UserError: a source is not prepared, or `config.data.negatives` is set and no source has negatives.
    """
    from metaembed_jax.data.sources import preparation, records

    names = [name for name, *_ in data.sources]
    markers = [prepare(name, data.dir) for name in names]
    if data.negatives and not any(marker.get("negatives") for marker in markers):
        raise UserError(
            f"config.data.negatives={data.negatives}: no pair of {', '.join(names)} has negatives; "
            "set it to 0, or each step encodes as many documents in vain"
        )

    def open_source(name: str) -> Sequence:
        if name in GENERATED:
            return importlib.import_module(GENERATED[name]).training(data, seed)
        return records.open_split(Path(data.dir) / name, preparation.VERSION, "train").with_descriptions()

    return [open_source(name) for name in names]


def fingerprints(data: DataConfig) -> dict[str, str]:
    """Return the fingerprint of each source of a run, by name.

    Raises:
      UserError: as `prepare`.
    """
    return {name: prepare(name, data.dir)["fingerprint"] for name, *_ in data.sources}


def print_unused(data: DataConfig) -> None:
    """Print the keys of `config.data` that no source of a run reads."""
    names = [name for name, *_ in data.sources]
    for key, name in ONLY_OF.items():
        if (value := getattr(data, key)) and name not in names:
            print(f"config.data.{key}={value!r} has no effect: only the source {name!r} reads it", flush=True)


def with_pairs(names: Sequence[str], data_dir: str | Path, split: str) -> list[str]:
    """Return the sources that have pairs in a split.

    Raises:
      UserError: as `prepare`.
    """
    # Generated sources have pairs in every split, and their markers do not count them.
    return [name for name in dict.fromkeys(names) if prepare(name, data_dir).get("rows", {}).get(split) != 0]


def fixed_training(name: str, data_dir: str | Path) -> Sequence:
    """Return a source of training pairs that are the same in every epoch and step, with `describe`.

    Raises:
      UserError: as `prepare`.
    """
    prepare(name, data_dir)
    if name in GENERATED:
        return importlib.import_module(GENERATED[name]).fixed_training(data_dir)
    return stored_split(name, data_dir, "train").with_descriptions()


def stored_split(name: str, data_dir: str | Path, split: str) -> "Records":
    """Open a stored split of a source.

    Raises:
      UserError: as `prepare`.
    """
    from metaembed_jax.data.sources import preparation, records

    version = importlib.import_module(GENERATED[name]).VERSION if name in GENERATED else preparation.VERSION
    return records.open_split(Path(data_dir) / name, version, split)


def generated_task(name: str, data_dir: str | Path) -> str | None:
    """Return the generated source whose search tasks a source has: its own, or that which its negatives were mined in; or None.

    Raises:
      UserError: as `prepare`.
    """
    return name if name in GENERATED else prepare(name, data_dir).get("task")


def held_out_sizes(name: str, data_dir: str | Path, split: str) -> tuple[int, int] | None:
    """Return the numbers of queries and documents of `retrieval`; None for tasks of a generated source, which have hundreds.

    Raises:
      UserError: as `prepare`.
    """
    if generated_task(name, data_dir):
        return None
    sizes = prepare(name, data_dir)["held_out"][split]
    return sizes["queries"], sizes["documents"]


def retrieval(name: str, data_dir: str | Path, split: str) -> "Retrieval":
    """Return the search task of a source's validation or test split, which has pairs.

    Raises:
      UserError: as `prepare`.
    """
    from metaembed_jax.data.sources import records

    pairs, task = stored_split(name, data_dir, split), generated_task(name, data_dir)
    return importlib.import_module(GENERATED[task]).retrieval(pairs) if task else records.pairs_retrieval(pairs)


def _find_sources(kind: str) -> Callable:
    module, function, _ = READERS[kind]
    return getattr(importlib.import_module(f"metaembed_jax.data.sources.{module}"), function)
