"""The folder of a run, which records its config so that no run of another config writes to it.

run.json          the config, fingerprints of the data, their changes by step, and the base weights if parameters are frozen
tokenizer.json    the vocabulary
checkpoints/      see metaembed_jax.checkpoints.runs
metrics.jsonl     a line every few steps
base/             in a bucket, the frozen weights: see metaembed_jax.checkpoints.frozen
lock              held by the run: see metaembed_jax.checkpoints.lease
results.json, results.txt, quality.png, report.html    the evaluation on the test split
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import jax

from metaembed_jax import files, hosts
from metaembed_jax.checkpoints import lease
from metaembed_jax.checkpoints.base_weights import BaseRecord, BaseWeights
from metaembed_jax.config.record import FREE_KEYS, REPLANNED_KEYS, flat, from_record, is_in, to_record
from metaembed_jax.config.run import ModelSettings, RunConfig
from metaembed_jax.errors import UserError, shortened
from metaembed_jax.files import read_json

T = TypeVar("T")
BEFORE_RECORD = ("tokenizer.json", lease.NAME)  # files that are written before run.json
COMMITTED = "commit_success.txt"  # the file that Orbax writes last into a folder in a bucket
# Keys of config.model that determine the meaning of a checkpoint's numbers.
MODEL_KEYS = (
    "backbone",
    "architecture",
    "readout",
    "query_tokens",
    "document_tokens",
    "embedding_dim",
    "trained",
    "lora.rank",
    "lora.alpha",
)


def default_workdir(name: str, later: Path | None = None) -> Path:
    """Return the default folder of a run: runs/<name of the config>.

    Args:
      later: the folder of the run that starts from this one. If it is in a bucket, this run is placed next to it.

    Raises:
      UserError: the name is not the name of a folder.
    """
    if "/" in name or name in ("", ".", ".."):
        raise UserError(f"config.name={name!r}: expected the name of a folder; set it, or choose a --workdir")
    return (later.parent if later and files.is_bucket(later) else Path("runs")) / name


def create_workdir(workdir: Path, config: RunConfig, tokenizer: Path, base: BaseWeights | None, data: Mapping[str, str]) -> None:
    """Create the folder of a run, or check that it is the folder of this run. All hosts call it, the first host before the others.

    Args:
      base: the base weights, if parameters are frozen.
      data: fingerprints of the sources, by name.

    Raises:
      UserError: the folder is of another config (names the keys) or base, is not a run, or is not shared by all hosts.
    """
    check_workdir(workdir, config)
    record = workdir / "run.json"
    if not hosts.is_first() and not record.exists():
        raise UserError(f"{workdir}: this host does not see the files that the first one wrote; all hosts must share the --workdir")
    if record.exists():
        recorded = read_base(workdir)
        if base and (recorded is None or base.fingerprint != recorded.fingerprint):
            raise UserError(
                f"{workdir} is a run on other weights: fingerprint {recorded and recorded.fingerprint} there, and "
                f"{base.fingerprint} in {base.directory}; choose another --workdir"
            )
        return
    files.write_bytes(workdir / "tokenizer.json", tokenizer.read_bytes())
    files.write_json(record, _record(config, base, data))


def record_changes(workdir: Path, config: RunConfig, base: BaseWeights | None, data: Mapping[str, str], step: int) -> str:
    """Record the config and the data with which a run resumes from `step`; the first host writes.

    Args:
      data: fingerprints of the sources, by name.

    Returns:
      The changed keys and their values, for the user; empty if nothing changed.

    Raises:
      UserError: `config.schedule.steps` is less than `step`, or run.json is malformed.
    """
    if step > config.schedule.steps:
        raise UserError(
            f"config.schedule.steps={config.schedule.steps}: {workdir} is at step {step} already; expected at least that many"
        )
    record = read_json(workdir / "run.json")
    earlier, before = _entry(workdir, record, "changes", []), _entry(workdir, record, "data", {})
    ours, theirs = flat(to_record(config)), flat(record["config"])
    changed = {key: [theirs.get(key), value] for key, value in ours.items() if theirs.get(key) != value}
    changed |= {f"the rows of {name}": [before[name], now] for name, now in data.items() if before.get(name, now) != now}
    if not changed:
        return ""
    record |= _record(config, base, data) | {"changes": [*earlier, {"step": step, "keys": changed}]}
    if hosts.is_first():
        files.write_json(workdir / "run.json", record)
    text = ", ".join(f"{key} from {before!r} to {after!r}" for key, (before, after) in changed.items())
    if "schedule.steps" in changed and step < config.schedule.steps:
        text += f"; from here on the learning rate is that of a run of {config.schedule.steps} steps"
    return text


def check_hosts_agree(config: RunConfig) -> None:
    """Check that all hosts were started with the same config.

    Raises:
      UserError: names the first key that differs.
    """
    theirs = json.loads(hosts.from_first(json.dumps(to_record(config))))
    if different := _different(to_record(config), theirs, ("data.dir",)):
        raise UserError(
            f"the hosts of this run disagree: {different}; 'there' is the first host, 'here' host {jax.process_index()}"
        )


def check_workdir(workdir: Path, config: RunConfig) -> None:
    """Check that a folder is of a run of this config, or can become one.

    Raises:
      UserError: the folder is of another config (names the keys), or is not a run.
    """
    if (workdir / "run.json").exists():
        filled = () if config.model.architecture else ("model.backbone", "model.architecture")  # read from the start of the run
        moved = ("init_from",) if read_base(workdir) else ()  # the fingerprint identifies it
        if different := _different(to_record(config), to_record(read_config(workdir)), FREE_KEYS + REPLANNED_KEYS + filled + moved):
            raise UserError(f"{workdir} is a run of another config: {different}; choose another --workdir, or move the folder away")
    elif workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir} is a file; choose another --workdir")
    elif workdir.exists() and any(path.name not in BEFORE_RECORD and not files.is_unfinished(path) for path in workdir.iterdir()):
        raise UserError(f"{workdir} is not empty and is not a run: it has no run.json; choose another --workdir")


def check_model(workdir: Path, model: ModelSettings, keys: tuple[str, ...] = MODEL_KEYS) -> None:
    """Check that the parameters of a run fit the model of another config.

    Raises:
      UserError: names the first of `keys` that differs.
    """
    ours, theirs = ({"model": to_record(section)} for section in (model, read_config(workdir).model))
    if different := _different(ours, theirs, (), tuple(f"model.{key}" for key in keys)):
        raise UserError(f"{workdir} is a run of another model: {different}")


def has_checkpoints(workdir: Path) -> bool:
    """Return whether the folder is of a run that saved a checkpoint."""
    return (workdir / "run.json").is_file() and any(map(is_saved, (workdir / "checkpoints").glob("*")))


def is_saved(step: Path) -> bool:
    """Return whether a folder is a complete checkpoint; one in a bucket has its name before it is complete."""
    return step.name.isdigit() and (not files.is_bucket(step) or (step / COMMITTED).exists())


def is_finished(workdir: Path, config: RunConfig) -> bool:
    """Return whether the folder is of a run of this config that is trained to its last step, evaluated and exported.

    Raises:
      UserError: as `check_workdir`.
    """
    check_workdir(workdir, config)
    results = workdir / "results.json"
    if not results.exists() or flat(read_json(results)).get("config.schedule.steps") != config.schedule.steps:  # of an earlier end
        return False
    return all((workdir / "export" / kind / "README.md").exists() for kind in config.schedule.exports)


def read_config(workdir: Path) -> RunConfig:
    """Return the config of a run.

    Raises:
      UserError: the folder is not a run, or its record is not of a config.
    """
    record = workdir / "run.json"
    if not record.exists():
        raise UserError(f"{files.absolute(workdir)} is not a run: it has no run.json")
    try:
        return from_record(read_json(record).get("config"))
    except UserError as error:
        raise UserError(f"{record}: {error}; expected the record of a run of this version") from error


def read_base(workdir: Path) -> BaseRecord | None:
    """Return the base weights that a run records; None if all its parameters are trained.

    Raises:
      UserError: the folder is not a run, or its record of base weights is malformed.
    """
    record = workdir / "run.json"
    base = read_json(record).get("base")
    if base is None:
        return None
    if not isinstance(base, dict) or not all(isinstance(base.get(key), str) for key in BaseRecord._fields):
        raise UserError(f"{record}: base={shortened(base)}: expected a name and a fingerprint")
    return BaseRecord(base["name"], base["fingerprint"])


def _entry(workdir: Path, record: dict, key: str, default: T) -> T:
    """Return an optional entry of run.json, of the type of its default."""
    value = record.get(key, default)
    if not isinstance(value, type(default)):
        raise UserError(f"{workdir / 'run.json'}: {key}={shortened(value)}: expected a {type(default).__name__}")
    return value


def _record(config: RunConfig, base: BaseWeights | None, data: Mapping[str, str]) -> dict:
    return {"config": to_record(config), "data": dict(data)} | (
        {"base": {"name": base.name, "fingerprint": base.fingerprint}} if base else {}
    )


def _different(ours: dict, theirs: dict, free: tuple[str, ...], only: tuple[str, ...] = ()) -> str:
    """Name the keys that differ and are not in `free`; with `only`, no keys but those are compared."""
    ours, theirs = flat(ours), flat(theirs)
    keys = [key for key in sorted(ours.keys() | theirs.keys()) if (not only or is_in(key, only)) and not is_in(key, free)]
    different = [key for key in keys if ours.get(key) != theirs.get(key)]
    if not different:
        return ""
    key, more = different[0], f", and {len(different) - 1} more keys differ" if different[1:] else ""
    return f"{key} is {shortened(theirs.get(key))} there and {shortened(ours.get(key))} here{more}"
