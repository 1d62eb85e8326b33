"""The checkpoints of a run: the latest few and the best, written by Orbax in the background.

    <workdir>/checkpoints/<step>/parameters    what inference reads
    <workdir>/checkpoints/<step>/optimizer     with it, all that the next training step needs

Batch n is a pure function of (config, n), so the step is also the position in the data.
"""

import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path

import absl.logging
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from metaembed_jax import files, hosts
from metaembed_jax.errors import UserError

WHOLE_BELOW = 2**20  # bytes of a slice: cutting up a small array for all devices that hold it takes longer than writing it
UNREADABLE = (ValueError, OSError, KeyError, RuntimeError, json.JSONDecodeError)


class RunCheckpoints:
    """Saves and restores what a run has trained. The best by its metric stays beside the latest `keep`."""

    def __init__(self, workdir: Path, keep: int = 1):
        absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax narrates every step of its work
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # and leaves errors of its tasks lying, which would be told twice
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
        """Saved steps, latest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def best_step(self) -> int | None:
        """The step with the highest metric; of those without any validation, the latest."""
        best = self._manager.best_step()
        return self._manager.latest_step() if best is None else best

    def save(self, step: int, parameters: dict, optimizer, metric: float | None) -> None:
        """Copies the arrays off their devices and writes them in the background.

        Raises:
          UserError: this or the save before it could not be written; what was saved earlier stands.
        """
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(parameters=ocp.args.PyTreeSave(parameters), optimizer=ocp.args.PyTreeSave(optimizer))
        self._writing(
            lambda: self._manager.save(step, args=items, metrics=None if metric is None else {"metric": metric}, force=True)
        )

    def wait(self) -> None:
        """Returns when everything saved is on disk. Raises UserError as `save`."""
        self._writing(self._manager.wait_until_finished)

    def restore_latest(self, parameters: dict, optimizer, report: Callable[[str], None]) -> tuple[int, dict, object] | None:
        """(step, parameters, optimizer state) of the latest checkpoint that can be read, or None where there is none.

        Args:
          parameters, optimizer: shapes, dtypes and shardings to restore onto.
          report: called with a line for each checkpoint that is passed over.

        Raises:
          UserError: there are checkpoints and none can be read, or their shapes are another model's.
        """
        for step in self.steps():
            try:
                self._check_shapes(step, parameters)
                items = ocp.args.Composite(parameters=onto(parameters), optimizer=onto(optimizer))
                restored = self._manager.restore(step, args=items)
                return step, restored["parameters"], restored["optimizer"]
            except (UserError, jax.errors.JaxRuntimeError):  # devices without memory say nothing about the files
                raise
            except UNREADABLE as error:
                report(f"{self.directory / str(step)} cannot be read ({reason_of(error)}); falling back to the checkpoint before")
        if self.steps():
            raise UserError(f"{self.directory}: none of its checkpoints can be read; move the folder away to start anew")
        return None

    def restore_parameters(self, step: int, parameters: dict) -> dict:
        """The parameters of one checkpoint, on the shardings of `parameters`.

        Raises:
          UserError: it cannot be read, or its shapes are another model's.
        """
        try:
            self._check_shapes(step, parameters)
            return self._manager.restore(step, args=ocp.args.Composite(parameters=onto(parameters)))["parameters"]
        except (UserError, jax.errors.JaxRuntimeError):
            raise
        except UNREADABLE as error:
            raise UserError(f"{self.directory / str(step)} cannot be read: {reason_of(error)}") from error

    def set_aside_after(self, step: int) -> None:
        """Renames checkpoints later than `step`: those that could not be read, which training writes anew."""
        for later in self.steps():
            if later > step and hosts.is_first():
                _set_aside(self.directory / str(later))
        hosts.wait_for_all("unreadable checkpoints are set aside")
        self._manager.reload()

    def close(self) -> None:
        """Waits for what is being written, and frees the threads."""
        self.wait()
        self._manager.close()

    def _check_shapes(self, step: int, parameters: dict) -> None:
        # The manager's own reader takes what it saved itself to a bucket for unfinished, on all hosts but the first.
        stored = jax.tree.map(lambda leaf: tuple(leaf.shape), stored_tree(self.directory / str(step) / "parameters"))
        stored, expected = dict(_leaves(stored)), dict(_leaves(jax.tree.map(lambda leaf: tuple(leaf.shape), parameters)))
        for path in sorted(stored.keys() | expected.keys()):
            if stored.get(path) != expected.get(path):
                has, wants = stored.get(path, "nothing"), expected.get(path, "nothing")
                raise UserError(
                    f"{self.directory / str(step)} is of another model: {path} has {has} there, and the config asks for {wants}"
                )

    def _writing(self, action: Callable[[], None]) -> None:
        try:
            action()
        except (OSError, ValueError, RuntimeError) as error:
            # Read from the disk: the manager already counts the one that failed, and no longer what it would have replaced.
            kept = ", ".join(map(str, sorted(self._manager.all_steps(read=True), reverse=True))) or "none"
            raise UserError(f"{self.directory}: saving failed ({reason_of(error)}); checkpoints kept: {kept}") from error


def tree_handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler of a tree of arrays."""
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=WHOLE_BELOW)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def stored_tree(folder: Path) -> dict:
    """Shapes and dtypes of a tree of arrays as it is stored.

    Raises:
      ValueError: they cannot be read; any of `UNREADABLE`.
    """
    with ocp.Checkpointer(tree_handler()) as checkpointer:
        metadata = checkpointer.metadata(folder).item_metadata
    if metadata is None:
        raise ValueError("its metadata is missing")
    return metadata.tree


def onto(tree) -> ocp.args.PyTreeRestore:
    """How Orbax restores arrays onto the dtypes and shardings of a tree."""
    return ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))


def _set_aside_torn(directory: Path) -> None:
    """Renames checkpoints whose metric cannot be read: Orbax reads all metrics first, and would give up."""
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
    """Renames a checkpoint to <step>.unreadable, or with a number behind it where that is taken."""
    names = (f"{step.name}.unreadable{number or ''}" for number in itertools.count())
    aside = next(path for path in map(step.with_name, names) if not path.exists())
    try:
        step.rename(aside)
    except OSError as error:
        raise UserError(f"{step} cannot be read, nor renamed to {aside.name} ({reason_of(error)})") from error
    print(f"{step} is set aside as {aside.name}", flush=True)


def _leaves(tree: dict) -> list[tuple[str, tuple[int, ...]]]:
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, tuple))[0]
    return [(".".join(str(key.key) for key in path), leaf) for path, leaf in flat]


def reason_of(error: BaseException) -> str:
    """One line of an error; of a long chain the last link, where the system's own words stand."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) < 200 else line.rsplit(": ", 1)[-1][:200]
