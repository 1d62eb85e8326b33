"""The folder of a run: what it is a run of, so that no other config ever writes into it.

run.json          the config, and the base where a part of it is frozen
tokenizer.json    the vocabulary it was trained with
checkpoints/      see metaembed_jax.checkpoints.runs
metrics.jsonl     a line every few steps
results.json, quality.png    the evaluation on the test split
"""

import json
import os
import shutil
from pathlib import Path

from ml_collections import ConfigDict

from metaembed_jax.checkpoints.base import Base
from metaembed_jax.errors import UserError

# What may change between the parts of one run, because it changes no number.
FREE_KEYS = ("mesh", "log_every", "keep_checkpoints", "data.dir")


def default_workdir(config: ConfigDict) -> Path:
    """runs/<config name>."""
    return Path("runs") / config.name


def claim(workdir: Path, config: ConfigDict, tokenizer: Path, base: Base | None) -> None:
    """Makes the folder this config's, or finds that it is.

    Args:
      base: the weights that the run keeps, where a part of them is frozen.

    Raises:
      UserError: it is another config's run (names the keys), one on another base, or something else.
    """
    record = workdir / "run.json"
    if record.exists():
        stored = _read(record)
        _compare(workdir, _plain(config), stored["config"], FREE_KEYS + (("init_from",) if base else ()))
        if base and base.fingerprint != (stored.get("base") or {}).get("fingerprint"):
            raise UserError(
                f"{workdir} is a run on other weights: fingerprint {(stored.get('base') or {}).get('fingerprint')} there, and "
                f"{base.fingerprint} in {base.directory}; choose another --workdir"
            )
        return
    if workdir.exists() and any(path.name != "tokenizer.json" and not path.name.endswith(".tmp") for path in workdir.iterdir()):
        raise UserError(f"{workdir} exists and is no run: choose another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tokenizer, workdir / "tokenizer.json")
    content = {"config": _plain(config)} | ({"base": {"name": base.name, "fingerprint": base.fingerprint}} if base else {})
    temporary = workdir / "run.json.tmp"
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, record)


def is_finished(workdir: Path, config: ConfigDict) -> bool:
    """Whether the folder holds a run of this config that was trained to its end.

    Raises:
      UserError: it is another config's run (names the keys).
    """
    if not (workdir / "run.json").is_file():
        return False
    filled = () if config.architecture else ("backbone", "architecture")  # by what the run started from
    _compare(workdir, _plain(config), _read(workdir / "run.json")["config"], FREE_KEYS + filled)
    return (workdir / "results.json").is_file()


def read_config(workdir: Path) -> ConfigDict:
    """The config of a run.

    Raises:
      UserError: it is no run.
    """
    record = Path(workdir) / "run.json"
    if not record.is_file():
        raise UserError(f"{workdir} is no run of train.py: it has no run.json")
    return ConfigDict(_tuples(_read(record)["config"]))


def read_base(workdir: Path) -> dict | None:
    """{"name", "fingerprint"} of the weights that a run keeps, for `base.open_recorded`; None where everything trained."""
    return _read(Path(workdir) / "run.json").get("base")


def _read(record: Path) -> dict:
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{record} cannot be read: {error}") from error


def _plain(config: ConfigDict) -> dict:
    return json.loads(config.to_json())


def _tuples(value):
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _compare(workdir: Path, ours: dict, theirs: dict, free: tuple[str, ...]) -> None:
    ours, theirs = _flat(ours), _flat(theirs)
    different = [
        key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key) and not key.startswith(free)
    ]
    if different:
        key = different[0]
        raise UserError(
            f"{workdir} is a run of another config: {key} is {theirs.get(key)!r} there and {ours.get(key)!r} here"
            f"{f', and {len(different) - 1} more keys differ' if different[1:] else ''}; choose another --workdir"
        )


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
