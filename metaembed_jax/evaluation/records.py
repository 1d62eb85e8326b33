"""What was found, as JSON: written by the first host, and found again by its key."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from metaembed_jax import hosts
from metaembed_jax.evaluation.report import write_file


def key_of(*parts) -> str:
    """16 hexadecimal digits that differ where the `repr` of the parts does."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


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
      UserError: as `report.write_file`.
    """
    if hosts.is_first():
        write_file(path, (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode())


def _read(path: Path) -> str:
    """The text of a JSON object; that of an empty one if there is none."""
    try:
        text = path.read_text(encoding="utf-8")
        return text if isinstance(json.loads(text), dict) else "{}"
    except (OSError, ValueError):
        return "{}"
