"""The frozen weights of a run in a bucket, kept once next to it as each host needs them.

    <workdir>/base      written by all hosts together before the first step, and committed as a whole by Orbax

A host that was preempted starts again on an empty disk. It reads its shards from here, where it would fetch the whole base from the
hub. run.json says which base it is; only the run writes here, so its fingerprint is not taken again.
"""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from metaembed_jax import files
from metaembed_jax.checkpoints.base_weights import BaseWeights
from metaembed_jax.checkpoints.runs import UNREADABLE, onto, reason_of, stored_tree, tree_handler
from metaembed_jax.checkpoints.workdir import COMMITTED, read_base, read_config
from metaembed_jax.errors import UserError

BASE = "base"


def keep(workdir: Path, frozen: dict) -> None:
    """Keeps the frozen weights of a run in a bucket, unless they are there; what a killed host left of them is written again.

    Args:
      frozen: nested dicts of arrays; called by all hosts.

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
    """Return whether a run in a bucket, which has checkpoints, needs nothing of what `config.init_from` names."""
    if not files.is_bucket(workdir) or read_config(workdir).init_from != init_from:
        return False
    return read_base(workdir) is None or is_kept(workdir)


def kept_base(workdir: Path, record: dict) -> BaseWeights:
    """The kept weights as the base that run.json records."""
    return BaseWeights(record["name"], workdir / BASE, record["fingerprint"])


def is_kept_base(base: BaseWeights) -> bool:
    """Return whether a base is of `kept_base`: all others are on a disk."""
    return files.is_bucket(base.directory)


def fits(folder: Path, abstract: dict) -> bool:
    """Return whether kept weights can be read, and have the paths, shapes and dtypes that are wanted: an export may want others."""
    try:
        trees = stored_tree(folder), abstract
    except UNREADABLE:
        return False
    kinds = [jax.tree.map(lambda leaf: (tuple(leaf.shape), str(leaf.dtype)), tree) for tree in trees]
    return kinds[0] == kinds[1]


def read_kept(folder: Path, abstract: dict) -> dict:
    """The kept weights, on the shardings of `abstract`.

    Raises:
      UserError: they cannot be read.
    """
    try:
        with ocp.Checkpointer(tree_handler()) as checkpointer:
            return checkpointer.restore(folder, args=onto(abstract))
    except jax.errors.JaxRuntimeError:  # devices without memory say nothing about the files
        raise
    except UNREADABLE as error:
        raise UserError(f"{folder}: cannot be read ({reason_of(error)}); remove it, and the base is read again") from error
