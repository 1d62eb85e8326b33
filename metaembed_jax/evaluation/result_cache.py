"""A cache of results of finished tasks: JSON files that the first host writes, each valid for one key."""

import json
from collections.abc import Callable
from pathlib import Path

from metaembed_jax import files, hosts
from metaembed_jax.results import TaskResults, from_json, to_json

LAYOUT = 3  # of a file; files of other layouts are not read


def key_of(*values: object) -> str:
    """Return 16 hexadecimal digits of the `repr` of values."""
    return files.digest(repr(values).encode())


def cached(path: Path, key: str, evaluate: Callable[[], TaskResults]) -> TaskResults:
    """Return the results in a file if it has this key; else evaluate, and write the results to the file.

    Args:
      key: must differ whenever the results may differ.
    """
    key = key_of(LAYOUT, key)
    stored = json.loads(hosts.from_first(_read(path)))
    if stored.get("key") == key:
        return from_json(TaskResults, stored)
    results = evaluate()
    if hosts.is_first():
        files.write_json(path, {"key": key, **to_json(results)}, sort_keys=True)
    return results


def _read(path: Path) -> str:
    """Return the text of a JSON object; "{}" if the file has none."""
    try:
        text = path.read_bytes().decode()
        return text if isinstance(json.loads(text), dict) else "{}"
    except (OSError, ValueError):
        return "{}"
