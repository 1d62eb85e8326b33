"""Results of finished tasks, as JSON files: written by the first host, and read again under the same key."""

import json
from collections.abc import Callable
from pathlib import Path

from metaembed_jax import files, hosts
from metaembed_jax.results import TaskResults, from_json, to_json

LAYOUT = 3  # of a file; one of an older layout does not count


def key_of(*parts: object) -> str:
    """16 hexadecimal digits that differ where the `repr` of the parts does."""
    return files.digest(repr(parts).encode())


def cached(path: Path, key: str, evaluate: Callable[[], TaskResults]) -> TaskResults:
    """Return the results in a file, if it was written under this key; else those of `evaluate`, which are then written there.

    Args:
      key: of all that the results depend on.
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
    """The text of a JSON object; that of an empty one if there is none."""
    try:
        text = path.read_bytes().decode()
        return text if isinstance(json.loads(text), dict) else "{}"
    except (OSError, ValueError):
        return "{}"
