"""The frozen weights of a run in a bucket, kept next to its checkpoints.

    <workdir>/base      written by all hosts together before the first step, and committed as a whole by Orbax

A host that was preempted starts again with an empty disk. It reads its shards from this folder instead of the whole base from the
hub. run.json records the base. Only the run writes this folder, so the fingerprint is not computed again.
"""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from metaembed_jax import files
from metaembed_jax.checkpoints.base_weights import BaseRecord, BaseWeights
from metaembed_jax.checkpoints.runs import UNREADABLE, onto, reason_of, stored_tree, tree_handler
from metaembed_jax.checkpoints.workdir import COMMITTED, read_base, read_config
from metaembed_jax.errors import UserError

BASE = "base"


def keep(workdir: Path, frozen: dict) -> None:
    """Write the frozen weights of a run in a bucket, unless they are complete there; must be called by all hosts.

    Args:
      frozen: nested dicts of arrays.

    Raises:
      UserError: they cannot be written.
    """
    if not frozen or not files.is_bucket(workdir) or is_kept(workdir):
        return
    try:
        with ocp.Checkpointer(tree_handler()) as checkpointer:
            checkpointer.save(workdir / BASE, args=ocp.args.PyTreeSave(frozen), force=True)
    except UNREADABLE as error:
        raise UserError(f"{workdir / BASE}: the frozen weights cannot be written ({reason_of(error)})") from error


def is_kept(workdir: Path) -> bool:
    """Return whether the folder of a run has all of its frozen weights."""
    return files.is_bucket(workdir) and (workdir / BASE / COMMITTED).exists()


def stands_alone(workdir: Path, init_from: str) -> bool:
    """Return whether a run that has checkpoints resumes without the weights that `config.init_from` names."""
    if not files.is_bucket(workdir) or read_config(workdir).init_from != init_from:
        return False
    return read_base(workdir) is None or is_kept(workdir)


def kept_base(workdir: Path, record: BaseRecord) -> BaseWeights:
    """Return the kept weights as the base weights that run.json records."""
    return BaseWeights(record.name, workdir / BASE, record.fingerprint)


def is_kept_base(base: BaseWeights) -> bool:
    """Return whether base weights are of `kept_base`; all others are on a disk."""
    return files.is_bucket(base.directory)


def fits(folder: Path, abstract: dict) -> bool:
    """Return whether kept weights can be read with the paths, shapes and dtypes of `abstract`; an export may need others."""
    try:
        trees = stored_tree(folder), abstract
    except UNREADABLE:
        return False
    kinds = [jax.tree.map(lambda leaf: (tuple(leaf.shape), str(leaf.dtype)), tree) for tree in trees]
    return kinds[0] == kinds[1]


def read_kept(folder: Path, abstract: dict) -> dict:
    """Read kept weights onto the shardings of `abstract`.

    Raises:
      UserError: they cannot be read.
    """
    try:
        with ocp.Checkpointer(tree_handler()) as checkpointer:
            return checkpointer.restore(folder, args=onto(abstract))
    except jax.errors.JaxRuntimeError:  # the devices are out of memory; the files may be intact
        raise
    except UNREADABLE as error:
        raise UserError(f"{folder} cannot be read ({reason_of(error)}); remove it to read the base again") from error
