"""The folder of a run: what it is a run of, so that no other config ever writes into it.

run.json          the config, what of it changed at which step, and the base where a part of it is frozen
tokenizer.json    the vocabulary it was trained with
checkpoints/      see metaembed_jax.checkpoints.runs
metrics.jsonl     a line every few steps
base/             in a bucket, the frozen weights: see metaembed_jax.checkpoints.frozen
lock              held by the run: see metaembed_jax.checkpoints.lease
results.json, results.txt, quality.png, report.html    the evaluation on the test split
"""

import json
from pathlib import Path

import jax

from metaembed_jax import files, hosts
from metaembed_jax.checkpoints import lease
from metaembed_jax.checkpoints.base_weights import BaseWeights
from metaembed_jax.config.record import FREE_KEYS, REPLANNED_KEYS, flat, from_record, is_in, to_record
from metaembed_jax.config.run import RunConfig
from metaembed_jax.errors import UserError
from metaembed_jax.files import read_json

BEFORE = ("tokenizer.json", lease.NAME)  # what a run that is being made has before its run.json
COMMITTED = "commit_success.txt"  # what Orbax writes last into a folder in a bucket
# What the numbers of a checkpoint mean.
MODEL_KEYS = (
    "model.backbone",
    "model.architecture",
    "model.query_tokens",
    "model.document_tokens",
    "model.embedding_dim",
    "model.trained",
    "model.lora.rank",
    "model.lora.alpha",
)


def default_workdir(name: str, later: Path | None = None) -> Path:
    """Return runs/<name of the config>; for a first stage of a run in a bucket, next to `later`, the folder of that.

    Raises:
      UserError: the name is no name of a folder.
    """
    if "/" in name or name in ("", ".", ".."):
        raise UserError(f"config.name={name!r}: expected the name of a folder; set it, or choose a --workdir")
    return (later.parent if later and files.is_bucket(later) else Path("runs")) / name


def create_workdir(workdir: Path, config: RunConfig, tokenizer: Path, base: BaseWeights | None) -> None:
    """Makes the folder this config's, or finds that it is; the first host makes it, and the others then find it.

    Args:
      base: the weights that the run keeps, where a part of them is frozen.

    Raises:
      UserError: it is another config's run (names the keys), one on another base, or something else, or not shared by all hosts.
    """
    check_workdir(workdir, config)
    record = workdir / "run.json"
    if not hosts.is_first() and not record.exists():
        raise UserError(f"{workdir}: this host does not see what the first one wrote there; all hosts must share the --workdir")
    if record.exists():
        fingerprint = (read_base(workdir) or {}).get("fingerprint")
        if base and base.fingerprint != fingerprint:
            raise UserError(
                f"{workdir} is a run on other weights: fingerprint {fingerprint} there, and {base.fingerprint} in "
                f"{base.directory}; choose another --workdir"
            )
        return
    files.write_bytes(workdir / "tokenizer.json", tokenizer.read_bytes())
    files.write_json(record, _record(config, base))


def record_changes(workdir: Path, config: RunConfig, base: BaseWeights | None, step: int) -> str:
    """Records the config that a run goes on with, and since which step; the first host writes.

    Returns:
      What changed, in words; "" where nothing did.

    Raises:
      UserError: it is to end before where it is.
    """
    if step > config.schedule.steps:
        raise UserError(
            f"config.schedule.steps={config.schedule.steps}: {workdir} is at step {step} already; expected at least that many"
        )
    record = read_json(workdir / "run.json")
    ours, theirs = flat(to_record(config)), flat(record["config"])
    changed = {key: [theirs.get(key), value] for key, value in ours.items() if theirs.get(key) != value}
    if not changed:
        return ""
    record |= _record(config, base) | {"changes": [*record.get("changes", ()), {"step": step, "keys": changed}]}
    if hosts.is_first():
        files.write_json(workdir / "run.json", record)
    words = ", ".join(f"{key} from {before!r} to {after!r}" for key, (before, after) in changed.items())
    if "schedule.steps" in changed and step < config.schedule.steps:
        words += f"; from here on the learning rate is that of a run of {config.schedule.steps} steps"
    return words


def check_hosts_agree(config: RunConfig) -> None:
    """Whether all hosts were started with the first one's config.

    Raises:
      UserError: names the first key that differs.
    """
    theirs = json.loads(hosts.from_first(json.dumps(to_record(config))))
    if different := _different(to_record(config), theirs, ("data.dir",)):
        raise UserError(
            f"the hosts of this run disagree: {different}; 'there' is the first host, 'here' host {jax.process_index()}"
        )


def check_workdir(workdir: Path, config: RunConfig) -> None:
    """Whether a folder is this config's, or could become it.

    Raises:
      UserError: it is another config's run (names the keys), or something else.
    """
    if (workdir / "run.json").exists():
        filled = () if config.model.architecture else ("model.backbone", "model.architecture")  # by what the run started from
        moved = ("init_from",) if read_base(workdir) else ()  # the fingerprint says whether it is the same
        if different := _different(to_record(config), to_record(read_config(workdir)), FREE_KEYS + REPLANNED_KEYS + filled + moved):
            raise UserError(f"{workdir} is a run of another config: {different}; choose another --workdir, or move the folder away")
    elif workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir} is a file: choose another --workdir")
    elif workdir.exists() and any(path.name not in BEFORE and not files.is_unfinished(path) for path in workdir.iterdir()):
        raise UserError(f"{workdir} exists and is no run: choose another --workdir")


def check_model(workdir: Path, config: RunConfig, keys: tuple[str, ...] = MODEL_KEYS) -> None:
    """Whether a run's parameters mean in this config what they meant in its own.

    Raises:
      UserError: names the first key of the model that differs.
    """
    if different := _different(to_record(config), to_record(read_config(workdir)), (), keys):
        raise UserError(f"{workdir} is a run of another model: {different}")


def has_checkpoints(workdir: Path) -> bool:
    """Whether the folder holds a run that saved something."""
    return (workdir / "run.json").is_file() and any(map(is_saved, (workdir / "checkpoints").glob("*")))


def is_saved(step: Path) -> bool:
    """Return whether a folder is a checkpoint that was written to its end; in a bucket it has its name before that."""
    return step.name.isdigit() and (not files.is_bucket(step) or (step / COMMITTED).exists())


def is_finished(workdir: Path, config: RunConfig) -> bool:
    """Whether the folder holds a run of this config that was trained to its end, evaluated and exported.

    Raises:
      UserError: it is another config's run (names the keys), or something else.
    """
    check_workdir(workdir, config)
    results = workdir / "results.json"
    if not results.exists() or flat(read_json(results)).get("config.schedule.steps") != config.schedule.steps:  # of an earlier end
        return False
    return all((workdir / "export" / kind / "README.md").exists() for kind in config.schedule.exports)


def read_config(workdir: Path) -> RunConfig:
    """Return the config of a run.

    Raises:
      UserError: it is not a run, or its keys or values are not those of a config.
    """
    record = workdir / "run.json"
    if not record.exists():
        raise UserError(f"{workdir} is no run of train.py: it has no run.json")
    try:
        return from_record(read_json(record).get("config"))
    except UserError as error:
        raise UserError(f"{record}: {error}; not the record of a run, or that of another version") from error


def read_base(workdir: Path) -> dict | None:
    """{"name", "fingerprint"} of the weights that a run keeps, for `base.open_recorded`; None where everything trained.

    Raises:
      UserError: it is no run, or its record of a base is something else.
    """
    record = workdir / "run.json"
    base = read_json(record).get("base")
    if base is not None and not (isinstance(base, dict) and all(isinstance(base.get(key), str) for key in ("name", "fingerprint"))):
        raise UserError(f"{record}: base is {base!r}, not a name and a fingerprint")
    return base


def _record(config: RunConfig, base: BaseWeights | None) -> dict:
    return {"config": to_record(config)} | ({"base": {"name": base.name, "fingerprint": base.fingerprint}} if base else {})


def _different(ours: dict, theirs: dict, free: tuple[str, ...], only: tuple[str, ...] = ()) -> str:
    """Name the keys that differ, in words; those in `free` may, and with `only` no others than those in it count."""
    ours, theirs = flat(ours), flat(theirs)
    keys = [key for key in sorted(ours.keys() | theirs.keys()) if (not only or is_in(key, only)) and not is_in(key, free)]
    different = [key for key in keys if ours.get(key) != theirs.get(key)]
    if not different:
        return ""
    key, more = different[0], f", and {len(different) - 1} more keys differ" if different[1:] else ""
    return f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} here{more}"
