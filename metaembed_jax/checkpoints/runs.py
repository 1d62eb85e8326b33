"""The checkpoints of a run: the latest ones and the best, written by Orbax in the background.

    <workdir>/checkpoints/<step>/parameters    for inference and training
    <workdir>/checkpoints/<step>/optimizer     for training

Batch n is a pure function of (config, n), so the step is also the position in the data.
"""

import contextlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import absl.logging
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from metaembed_jax import files, hosts
from metaembed_jax.errors import UserError

MIN_SLICED_BYTES = 2**20  # one device writes a smaller array faster than all devices that hold it write slices
UNREADABLE = (ValueError, OSError, KeyError, RuntimeError, json.JSONDecodeError)


class Restored(NamedTuple):
    """A checkpoint to resume from."""

    step: int
    parameters: dict
    optimizer: Any


class RunCheckpoints:
    """Saves and restores the trained parameters of a run. The checkpoint of the best metric and the latest `keep` are kept."""

    def __init__(self, workdir: Path, keep: int = 1):
        absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax logs every step of its work
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it logs errors of Orbax's tasks, which are raised as well
        policy = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(keep),
                preservation_policy.BestN(
                    get_metric_fn=lambda metrics: metrics["metric"], n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, best_fn=lambda metrics: metrics["metric"])
        self.directory = files.absolute(workdir / "checkpoints")
        if hosts.is_first():
            _set_aside_torn(self.directory)
        hosts.wait_for_all("torn checkpoints are set aside")
        handlers = {name: tree_handler() for name in ("parameters", "optimizer")}
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """Return the saved steps, latest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def best_step(self) -> int:
        """Return the step of the highest metric, or the latest one if no checkpoint has a metric.

        Raises:
          UserError: there are no checkpoints.
        """
        best = self._manager.best_step()
        step = self._manager.latest_step() if best is None else best
        if step is None:
            raise UserError(f"{self.directory.parent} has no checkpoints yet; train it first")
        return step

    def save(self, step: int, parameters: dict, optimizer: Any, metric: float | None) -> None:
        """Copy the arrays off their devices, and write them in the background.

        Raises:
          UserError: this or the previous save could not be written; earlier checkpoints stay.
        """
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(parameters=ocp.args.PyTreeSave(parameters), optimizer=ocp.args.PyTreeSave(optimizer))
        metrics = None if metric is None else {"metric": metric}
        with self._writing():
            self._manager.save(step, args=items, metrics=metrics, force=True)

    def wait(self) -> None:
        """Wait until all saves are written; raise UserError as `save` does."""
        with self._writing():
            self._manager.wait_until_finished()

    def restore_latest(self, parameters: dict, optimizer: Any, report: Callable[[str], None]) -> Restored | None:
        """Restore the latest checkpoint that can be read; return None if there are no checkpoints.

        Args:
          parameters, optimizer: shapes, dtypes and shardings to restore onto.
          report: called with a line for each checkpoint that cannot be read.

        Raises:
          UserError: none of the checkpoints can be read, or they have the shapes of another model.
        """
        for step in self.steps():
            try:
                self._check_shapes(step, parameters)
                items = ocp.args.Composite(parameters=onto(parameters), optimizer=onto(optimizer))
                restored = self._manager.restore(step, args=items)
                return Restored(step, restored["parameters"], restored["optimizer"])
            except (UserError, jax.errors.JaxRuntimeError):  # the devices are out of memory; the files may be intact
                raise
            except UNREADABLE as error:
                report(f"{self.directory / str(step)} cannot be read ({reason_of(error)}); trying the checkpoint before it")
        if self.steps():
            raise UserError(f"{self.directory}: none of its checkpoints can be read; move the folder away to start again")
        return None

    def restore_parameters(self, step: int, parameters: dict) -> dict:
        """Restore the parameters of a checkpoint onto the shardings of `parameters`.

        Raises:
          UserError: it cannot be read, or has the shapes of another model.
        """
        try:
            self._check_shapes(step, parameters)
            return self._manager.restore(step, args=ocp.args.Composite(parameters=onto(parameters)))["parameters"]
        except (UserError, jax.errors.JaxRuntimeError):
            raise
        except UNREADABLE as error:
            raise UserError(f"{self.directory / str(step)} cannot be read: {reason_of(error)}") from error

    def set_aside_after(self, step: int) -> None:
        """Rename the checkpoints after `step`, which could not be read; training writes these steps again."""
        for later in self.steps():
            if later > step and hosts.is_first():
                _set_aside(self.directory / str(later))
        hosts.wait_for_all("unreadable checkpoints are set aside")
        self._manager.reload()

    def close(self) -> None:
        """Wait for all saves, and end the threads."""
        self.wait()
        self._manager.close()

    def _check_shapes(self, step: int, parameters: dict) -> None:
        # Not by the manager: in a bucket, all hosts but the first take its saves for unfinished.
        stored, expected = (_shapes(tree) for tree in (stored_tree(self.directory / str(step) / "parameters"), parameters))
        for path in sorted(stored.keys() | expected.keys()):
            if stored.get(path) != expected.get(path):
                saved, asked = stored.get(path, "nothing"), expected.get(path, "nothing")
                raise UserError(
                    f"{self.directory / str(step)} is of another model: {path} has {saved} there, and the config asks for {asked}"
                )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            # Read from the disk: the manager's own list has the save that failed, and lacks those that it would have replaced.
            kept = ", ".join(map(str, sorted(self._manager.all_steps(read=True), reverse=True))) or "none"
            raise UserError(f"{self.directory}: saving failed ({reason_of(error)}); checkpoints kept: {kept}") from error


def tree_handler() -> ocp.PyTreeCheckpointHandler:
    """Return Orbax's handler of a tree of arrays."""
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=MIN_SLICED_BYTES)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def stored_tree(folder: Path) -> dict:
    """Return the shapes and dtypes of a stored tree of arrays.

    Raises:
      ValueError, or another of `UNREADABLE`: the tree cannot be read.
    """
    with ocp.Checkpointer(tree_handler()) as checkpointer:
        metadata = checkpointer.metadata(folder).item_metadata
    if metadata is None:
        raise ValueError("its metadata is missing")
    return metadata.tree


def onto(tree) -> ocp.args.PyTreeRestore:
    """Return Orbax's arguments to restore arrays onto the dtypes and shardings of a tree."""
    return ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))


def _set_aside_torn(directory: Path) -> None:
    """Rename the checkpoints whose metric cannot be read. Orbax reads all metrics first, and fails if one is damaged."""
    for file in sorted(directory.glob("*/metrics/metrics")):
        step = file.parents[1]
        if not step.name.isdigit():
            continue
        try:
            json.loads(file.read_bytes())["metric"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"{file} cannot be read ({reason_of(error)})", flush=True)
            _set_aside(step)


def _set_aside(step: Path) -> None:
    """Rename a checkpoint to <step>.unreadable, with a number after it if that name is taken."""
    names = (f"{step.name}.unreadable{number or ''}" for number in itertools.count())
    aside = next(path for path in map(step.with_name, names) if not path.exists())
    try:
        step.rename(aside)
    except OSError as error:
        raise UserError(f"{step} can neither be read nor renamed to {aside.name} ({reason_of(error)})") from error
    print(f"{step} is set aside as {aside.name}", flush=True)


def _shapes(tree: dict) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(str(key.key) for key in path): tuple(leaf.shape) for path, leaf in leaves}


def reason_of(error: BaseException) -> str:
    """Return the first line of an error; of a long line its last part, which is the message of the system."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) < 200 else line.rsplit(": ", 1)[-1][:200]
