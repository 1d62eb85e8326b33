"""What was found, as JSON: written by the first host, and found again by its key."""

import json
from collections.abc import Callable
from pathlib import Path

from metaembed_jax import files, hosts


def key_of(*parts) -> str:
    """16 hexadecimal digits that differ where the `repr` of the parts does."""
    return files.digest(repr(parts).encode())


def found_once(path: Path, key: str, find: Callable[[], dict]) -> dict:
    """What a file holds, if it was written under this key; else what `find` returns, which is then written there.

    Args:
      key: of all that the result depends on.
    """
    done = json.loads(hosts.from_first(_read(path)))
    if done.get("key") != key:
        done = {"key": key, **find()}
        write_json(path, done)
    return done


def write_json(path: Path, content: dict) -> None:
    """Writes JSON with sorted keys, on the first host.

    Raises:
      UserError: as `files.write_bytes`.
    """
    if hosts.is_first():
        files.write_json(path, content, sort_keys=True)


def _read(path: Path) -> str:
    """The text of a JSON object; that of an empty one if there is none."""
    try:
        text = path.read_bytes().decode()
        return text if isinstance(json.loads(text), dict) else "{}"
    except (OSError, ValueError):
        return "{}"
