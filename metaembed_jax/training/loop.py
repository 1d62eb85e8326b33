"""Train a run from its config to its results: a loop around the pure step of `training.step`."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from metaembed_jax import files, hosts
from metaembed_jax.batch.training import StepShape, TrainingBatch
from metaembed_jax.batch.training import put as put_batch
from metaembed_jax.checkpoints import lease
from metaembed_jax.checkpoints.export import check_format, export
from metaembed_jax.checkpoints.frozen import keep
from metaembed_jax.checkpoints.loading import run_processor
from metaembed_jax.checkpoints.room import check_room
from metaembed_jax.checkpoints.runs import RunCheckpoints
from metaembed_jax.checkpoints.workdir import (
    check_hosts_agree,
    check_workdir,
    create_workdir,
    default_workdir,
    has_checkpoints,
    is_finished,
    record_changes,
)
from metaembed_jax.compilation import announced
from metaembed_jax.config.run import RunConfig
from metaembed_jax.data import sources
from metaembed_jax.data.mixture import check_mixture
from metaembed_jax.data.pipeline import iterate, training_batches
from metaembed_jax.data.row_plan import RowPlan
from metaembed_jax.data.run_items import RunItems, run_items
from metaembed_jax.data.stored_plan import stored_plan
from metaembed_jax.devices import check_devices, describe_devices
from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.evaluator import Subject
from metaembed_jax.evaluation.held_out import HeldOut
from metaembed_jax.evaluation.report import TEST_SPLIT, write_report
from metaembed_jax.evaluation.tables import format_tables
from metaembed_jax.hosts.votes import Stop, stop_signal
from metaembed_jax.late_interaction.budgets import budget_name
from metaembed_jax.model import MetaEmbed
from metaembed_jax.network_config import model_config
from metaembed_jax.sharding import batch_shards, rows_here
from metaembed_jax.trainable import join, paths, split
from metaembed_jax.training.initialize import describe, find_start, initial_state
from metaembed_jax.training.metrics import MetricsWriter
from metaembed_jax.training.profile import Stopwatch, Trace
from metaembed_jax.training.saving import SaveSchedule
from metaembed_jax.training.speed import Speed, shown
from metaembed_jax.training.stages import stages
from metaembed_jax.training.step import Trainer, TrainState, make_trainer, run_mesh
from metaembed_jax.training.validation import Validation, print_held_out, validators


def train(config: RunConfig, workdir: Path) -> bool:
    """Train until the last step, from the latest checkpoint if there is one; then evaluate the best one on the test split.

    Returns:
      False if SIGTERM stopped the run between two steps: everything is saved, and the same call continues.

    Raises:
      UserError: anything that the user can repair; saved checkpoints stay.
      Terminated: SIGTERM came before the first step, or after the last one, which is saved; the same call continues.
    """
    with stop_signal() as stop:
        with stop.at_once():
            check_devices()
            check_hosts_agree(config)
            _check(config, workdir)
            print(describe_devices(run_mesh(config)), flush=True)
            earlier = [(stage, default_workdir(stage.name, workdir)) for stage in stages(config)[:-1]]
            runs = _unfinished([*earlier, (config, workdir)])
            for stage, folder in runs[:-1]:
                _check(stage, folder)
            for stage, _ in runs[1:]:  # the first one opens its own when it starts
                _open_sources(stage)
        for stage, folder in runs:
            if stage is not config:
                print(f"{config.name} starts from {stage.name}, which is trained first, by its own config", flush=True)
            if not _train_one(stage, folder, stop):
                return False
    return True


def _unfinished(runs: list[tuple[RunConfig, Path]]) -> list[tuple[RunConfig, Path]]:
    """Return the last run, after the runs that must be trained first.

    A run needs no earlier run if it has checkpoints, or if the run before it is finished.
    """
    folders = [folder if files.is_bucket(folder) else folder.resolve() for _, folder in runs]
    for (stage, folder), resolved in zip(runs[:-1], folders, strict=False):
        if folders.count(resolved) > 1:
            raise UserError(f"{folder} is the folder of {stage.name}, which this run starts from; choose another --workdir")
    first = len(runs) - 1
    while first > 0 and not has_checkpoints(runs[first][1]) and not is_finished(runs[first - 1][1], runs[first - 1][0]):
        first -= 1
    return runs[first:]


def _check(config: RunConfig, workdir: Path) -> None:
    """Refuse a run that cannot be trained, before hours of training its first stage."""
    mesh = run_mesh(config)
    validators(config)
    files.check_bucket(workdir)
    files.check_writable(workdir)
    check_workdir(workdir, config)
    if config.model.architecture:
        _check_trainer(config, make_trainer(config, mesh), workdir)


def _open_sources(config: RunConfig) -> list[Sequence]:
    """Open the training pairs of a run, and refuse sources that are not prepared or too small."""
    pairs = hosts.first_then_others(lambda: sources.training_records(config.data, config.seed))
    check_mixture(config.data, config.rows.batch_size, pairs)
    return pairs


def _check_trainer(config: RunConfig, trainer: Trainer, workdir: Path) -> None:
    """Refuse exports that the model does not have, and a disk that its checkpoints do not fit."""
    abstract, schedule = trainer.abstract, config.schedule
    check_room(workdir, (abstract.parameters, abstract.optimizer), schedule.keep_checkpoints, schedule.steps)
    for kind in schedule.exports:
        check_format(kind, config.model.backbone, paths(abstract.parameters))


class _Run(NamedTuple):
    """A run that is ready to train, without its state."""

    config: RunConfig
    workdir: Path
    trainer: Trainer
    checkpoints: RunCheckpoints
    model: MetaEmbed
    items: RunItems
    plan: RowPlan


def _train_one(config: RunConfig, workdir: Path, stop: Stop) -> bool:
    with contextlib.ExitStack() as stack:
        with stop.at_once():
            run, state = _open(config, workdir, stack)
        if not _train(run, state, stop):
            return False
        with stop.at_once():
            _finish(run)
    return True


def _open(config: RunConfig, workdir: Path, stack: contextlib.ExitStack) -> tuple[_Run, TrainState]:
    """Prepare a run, and return it with its state.

    Args:
      stack: holds the lock of the folder and the checkpoints open.
    """
    mesh = run_mesh(config)
    pairs = _open_sources(config)
    sources.print_unused(config.data)
    print_held_out(config)
    config, start = find_start(config, workdir)
    processor = run_processor(config, start.tokenizer)
    trainer = make_trainer(config, mesh)
    _check_trainer(config, trainer, workdir)
    items = hosts.first_then_others(lambda: run_items(config, processor, pairs))
    if hosts.is_first():  # after the checks: the lock makes the folder, and a run that is refused must not have one
        stack.enter_context(lease.held(workdir))
    data = sources.fingerprints(config.data)
    base = start.base if trainer.abstract.frozen else None
    hosts.first_then_others(lambda: create_workdir(workdir, config, start.tokenizer, base, data))
    checkpoints = stack.enter_context(contextlib.closing(RunCheckpoints(workdir, config.schedule.keep_checkpoints)))
    state = initial_state(config, trainer, checkpoints, start)
    keep(workdir, state.frozen)
    if hosts.is_first() and (changes := record_changes(workdir, config, base, data, int(state.step))):
        print(f"resuming with other settings: {changes}", flush=True)
    print(describe(state), flush=True)
    model = MetaEmbed(model_config(config), state.network_parameters(), processor, mesh)
    plan = hosts.first_then_others(lambda: stored_plan(items, config, workdir, silent=not hosts.is_first()))
    return _Run(config, workdir, trainer, checkpoints, model, items, plan), state


class _Pending:
    """The figures of the previous step, fetched after the next step is dispatched, so that the devices never wait."""

    def __init__(self, checkpoints: RunCheckpoints):
        self._checkpoints, self._step = checkpoints, 0
        self._figures: Mapping[str, Any] = {}

    def fetch(self) -> dict[str, float]:
        """Wait for the step and return its figures; empty before the first step.

        Raises:
          UserError: the loss is not a number; names the step and the last good checkpoint.
        """
        if not self._figures:
            return {}
        figures = {name: float(value) for name, value in self._figures.items()}
        if not math.isfinite(figures["loss"]) or not math.isfinite(figures["gradient_norm"]):
            self._checkpoints.wait()
            good = (self._checkpoints.steps() or ["none"])[0]
            raise UserError(
                f"step {self._step}: loss {figures['loss']}, gradient norm {figures['gradient_norm']}; "
                f"the last good checkpoint is step {good} in {self._checkpoints.directory}; "
                "lower the learning rate or check the data"
            )
        return figures

    def put(self, step: int, figures: Mapping[str, Any]) -> None:
        """Replace the figures by those of `step`, which the devices may still compute."""
        self._step, self._figures = step, figures


def _train(run: _Run, state: TrainState, stop: Stop) -> bool:
    """Train until the last step; return False if SIGTERM stopped it."""
    config, schedule, mesh, first = run.config, run.config.schedule, run.trainer.mesh, int(state.step)
    shape = run.plan.shape(config.rows.microbatch_rows, batch_shards(mesh))
    dataset = training_batches(run.items, shape, run.model.config.architecture.layout, rows_here(mesh, shape.size))
    writer = MetricsWriter(run.workdir, first, schedule.steps, silent=not hosts.is_first())
    validation = Validation(config, run.model, run.workdir, writer)
    pending, watch, trace = _Pending(run.checkpoints), Stopwatch(), Trace(schedule.trace_steps, run.workdir)
    saves, log = SaveSchedule(schedule.save_every, schedule.save_minutes), _Log(run, shape, first, writer)
    batches = iterate(dataset, first, schedule.steps, config.data.workers)
    train_step = None
    try:
        writer.print(run.plan.describe(shape))
        writer.write(first, run.plan.figures(shape))
        with saves.vote.watched():
            for step in range(first + 1, schedule.steps + 1):
                trace.before(step)
                # SIGTERM comes to all processes of a job, and ends workers that are still starting: those of the first batch.
                with watch.spending("input"), stop.at_once() if train_step is None else contextlib.nullcontext():
                    batch = next(batches)
                arrays = put_batch(batch, mesh)
                train_step = train_step or _compile(run.trainer, state, arrays, watch, writer)
                state, figures = train_step(state, arrays)
                pending.fetch()
                pending.put(step, figures)
                writer.advance()
                if step % schedule.log_every == 0 or step == schedule.steps:
                    log(step, pending.fetch(), watch.read())
                trace.after(step, pending.fetch)
                validate = step % config.evaluation.validate_every == 0 or step == schedule.steps
                stopping, saving = stop(), saves.due(step)
                if validate or stopping or saving:
                    pending.fetch()
                    with watch.spending("validation"):
                        metric = validation.run(state, step) if validate else None
                    with watch.spending("checkpoint"):
                        saves.begin()
                        writer.flush()  # before the checkpoint: a run that resumes from it has the lines up to it
                        run.checkpoints.save(step, state.parameters, state.optimizer, metric)
                    stopping = stop()  # SIGTERM may have come during the validation
                if stopping and step < schedule.steps:
                    run.checkpoints.wait()
                    writer.print(f"stopped by SIGTERM after step {step}, which is saved; the same command resumes from there")
                    return False
            run.checkpoints.wait()
            hosts.wait_for_all("trained")  # from here on, SIGTERM to one host ends all without a vote
        return True
    finally:
        batches.close()
        trace.close()
        writer.close()


class _Log:
    """Writes the figures of a step and the speed since the last call, and shows the loss and the accuracy at the largest budget."""

    def __init__(self, run: _Run, shape: StepShape, first: int, writer: MetricsWriter):
        self._items, self._shape, self._writer = run.items, shape, writer
        self._speed = Speed(run.config, shape, run.trainer.mesh, first)
        self._accuracy = f"accuracy/{budget_name(run.config.objectives.budgets[-1])}"  # only some objectives have it

    def __call__(self, step: int, figures: dict[str, float], spent: dict[str, float]) -> None:
        rates = self._speed.read(step, spent)
        self._writer.write(step, figures | self._items[step - 1].figures(self._shape) | rates | spent)
        accuracy = {"accuracy": figures[self._accuracy]} if self._accuracy in figures else {}
        self._writer.show(loss=figures["loss"], **accuracy, **shown(rates))


def _compile(trainer: Trainer, state: TrainState, arrays: TrainingBatch, watch: Stopwatch, writer: MetricsWriter) -> Callable:
    with watch.spending("compile"), announced("the training step"):
        train_step = trainer.step.lower(state, arrays).compile()
    writer.unpause()
    writer.print(f"compiled the training step in {watch.spent('compile'):.1f} s")
    return train_step


def _finish(run: _Run) -> None:
    """Evaluate the best checkpoint on the test split, if it has pairs, and export it."""
    evaluator = HeldOut(run.config.data, "test", run.config.objectives.budgets)
    if evaluator.has_pairs():
        _evaluate(run, evaluator)
    else:
        print(
            f"{run.workdir}: step {run.checkpoints.best_step()} is the run's checkpoint; not evaluated, without test pairs",
            flush=True,
        )
    if hosts.is_first():
        _export(run.config.schedule.exports, run.workdir)
    hosts.wait_for_all("finished")


def _evaluate(run: _Run, evaluator: HeldOut) -> None:
    config, model, workdir = run.config, run.model, run.workdir
    step = run.checkpoints.best_step()
    trained = run.checkpoints.restore_parameters(step, run.trainer.abstract.parameters)
    _, frozen = split(model.parameters, paths(trained))
    model.parameters = join(trained, frozen)
    subject = Subject.of_run(model, config, step)
    results = evaluator.run(subject, workdir, progress=hosts.is_first())
    if hosts.is_first():
        written = write_report(evaluator, subject, results, workdir, TEST_SPLIT)
        print(f"\n{workdir}: test split, best checkpoint (step {step})\n{format_tables(results)}", flush=True)
        print(f"\nwritten: {', '.join(map(str, written))}", flush=True)


def _export(kinds: Sequence[str], workdir: Path) -> None:
    if kinds and jax.process_count() > 1:
        command = f"python -m metaembed_jax export --checkpoint={workdir} --format={kinds[0]} --out=DIR"
        print(f"not exported, since there are several hosts; on one of them: {command}", flush=True)
        return
    for kind in kinds:
        out = workdir / "export" / kind
        for unfinished in filter(files.is_unfinished, out.parent.glob("*")):  # of an export that was killed
            files.remove_folder(unfinished)
        export(workdir, out, kind, replace=True)
        print(f"written: {out}", flush=True)
