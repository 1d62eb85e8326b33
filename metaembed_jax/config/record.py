"""The JSON of a config in the folder of a run, and the keys that may change between two starts of the run."""

import dataclasses
import json
from typing import TypeVar

from metaembed_jax.config.run import RunConfig
from metaembed_jax.config.section import Section, annotations, section_of
from metaembed_jax.errors import UserError, shortened

# Keys, or groups of keys, that each start may change. They change speed, memory, files and reports, and the order of float sums;
# `validate_every` also changes which steps can be the best. All other keys determine the numbers of a run, and stay.
FREE_KEYS = (
    "name",
    "rows.microbatch_rows",
    "rows.recompute",
    "rows.unroll_layers",
    "data.dir",
    "data.workers",
    "mesh",
    "schedule.log_every",
    "schedule.save_every",
    "schedule.save_minutes",
    "schedule.keep_checkpoints",
    "schedule.trace_steps",
    "schedule.exports",
    "evaluation.validate_every",
    "evaluation.evaluations",
)
# Keys that a start may change if the steps done so far fit; the rest of the run is planned again.
REPLANNED_KEYS = ("schedule.steps",)

S = TypeVar("S", bound=Section)


def to_record(section: Section) -> dict:
    """Return a config, or a section of it, as JSON's types: tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(section)))


def from_record(record: object) -> RunConfig:
    """Return the config of a record; inverse of `to_record`.

    Raises:
      UserError: a key is unknown or missing, or its value is not allowed.
    """
    return read_section(RunConfig, record, "config")


def flat(tree: dict, prefix: str = "") -> dict:
    """Return the values of nested dicts by dotted keys."""
    leaves = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def fixed(config: RunConfig) -> dict:
    """Return the values that no start of a run may change, by dotted keys."""
    return {key: value for key, value in flat(to_record(config)).items() if not is_in(key, FREE_KEYS + REPLANNED_KEYS)}


def is_in(key: str, keys: tuple[str, ...]) -> bool:
    """Return whether `keys` have a key or its group."""
    return any(key == entry or key.startswith(f"{entry}.") for entry in keys)


def read_section(kind: type[S], record: object, key: str) -> S:
    """Return the section of a record, whose name in errors is `key`.

    Raises:
      UserError: as `from_record`.
    """
    if not isinstance(record, dict):
        raise UserError(f"{key}={shortened(record)}: expected keys with values")
    known = annotations(kind)
    # A section that is None by default is absent from the records of runs from before it was added, which did not use it.
    unset = {field.name: None for field in dataclasses.fields(kind) if field.default is None and section_of(known[field.name])}
    record = unset | record
    for name in (*known, *record):
        if (name in known) != (name in record):
            raise UserError(f"{key}.{name} is {'missing' if name in known else 'not a key'}")
    values = {}
    for name, annotation in known.items():
        inner, value = section_of(annotation), record[name]
        values[name] = read_section(inner, value, f"{key}.{name}") if inner and isinstance(value, dict) else _tuples(value)
    return kind(**values)


def _tuples(value):
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
