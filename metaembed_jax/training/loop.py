"""A run from its config to its results: one loop around the pure step of `training.step`."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path

import jax

from metaembed_jax import files, hosts
from metaembed_jax.batch.training import put as put_batch
from metaembed_jax.checkpoints import lease
from metaembed_jax.checkpoints.export import check_format, export
from metaembed_jax.checkpoints.frozen import keep
from metaembed_jax.checkpoints.loading import run_processor
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
from metaembed_jax.evaluation.report import RUN, write_report
from metaembed_jax.evaluation.tables import format_tables
from metaembed_jax.hosts.votes import Stop, stop_signal
from metaembed_jax.late_interaction.budgets import budget_name
from metaembed_jax.model import MetaEmbed
from metaembed_jax.network_config import model_config
from metaembed_jax.sharding import batch_shards, rows_here
from metaembed_jax.trainable import join, paths, split
from metaembed_jax.training.initialize import describe, find_start, initial_state, stages
from metaembed_jax.training.metrics import MetricsWriter
from metaembed_jax.training.profile import Stopwatch, Trace
from metaembed_jax.training.saving import SaveSchedule
from metaembed_jax.training.speed import Speed, shown
from metaembed_jax.training.stages import stages
from metaembed_jax.training.step import Trainer, TrainState, make_trainer, run_mesh
from metaembed_jax.training.validation import Validation, validators


def train(config: RunConfig, workdir: Path) -> bool:
    """Trains, or goes on training, until the last step; then evaluates the best checkpoint on the test split.

    Returns:
      False if SIGTERM stopped it between two steps: everything is saved, and the same call goes on from there.

    Raises:
      UserError: anything that the user can put right; what was saved stands.
      Terminated: SIGTERM came before the first step, or after the last one, which is saved; the same call goes on from there.
    """
    with stop_signal() as stop:
        with stop.at_once():
            check_devices()
            check_hosts_agree(config)
            _check(config, workdir)
            print(describe_devices(run_mesh(config)), flush=True)
            runs = _needed([*((stage, default_workdir(stage.name, workdir)) for stage in stages(config)[:-1]), (config, workdir)])
            for stage, folder in runs[:-1]:
                _check(stage, folder)
        for stage, folder in runs:
            if stage is not config:
                print(f"{config.name} starts from {stage.name}, which is trained first, by its own config", flush=True)
            if not _train_one(stage, folder, stop):
                return False
    return True


def _needed(runs: list[tuple[RunConfig, Path]]) -> list[tuple[RunConfig, Path]]:
    """The last run, and before it those that it still needs: none once it has checkpoints, or the one before is finished."""
    folders = [folder if files.is_bucket(folder) else folder.resolve() for _, folder in runs]
    for (stage, folder), resolved in zip(runs[:-1], folders, strict=False):
        if folders.count(resolved) > 1:
            raise UserError(f"{folder} is the folder of {stage.name}, which this run starts from: choose another --workdir")
    first = len(runs) - 1
    while first > 0 and not has_checkpoints(runs[first][1]) and not is_finished(runs[first - 1][1], runs[first - 1][0]):
        first -= 1
    return runs[first:]


def _check(config: RunConfig, workdir: Path) -> None:
    """Refuses what cannot be trained: better before hours of a first stage than after."""
    mesh = run_mesh(config)
    validators(config)
    files.check_bucket(workdir)
    check_workdir(workdir, config)
    if config.model.architecture:
        _check_exports(config, make_trainer(config, mesh))


def _check_exports(config: RunConfig, trainer: Trainer) -> None:
    for kind in config.schedule.exports:
        check_format(kind, config.model.backbone, paths(trainer.abstract.parameters))


def _train_one(config: RunConfig, workdir: Path, stop: Stop) -> bool:
    with contextlib.ExitStack() as stack:
        with stop.at_once():
            mesh = run_mesh(config)
            pairs = hosts.first_then_others(lambda: sources.training_records(config.data, config.seed))
            check_mixture(config.data, config.rows.batch_size, pairs)
            for split_name in ("validation", "test"):
                HeldOut(config.data, split_name, config.objectives.budgets).check()
            if hosts.is_first():  # only now that all hosts agree: before, it would make a folder for a run that is refused
                stack.enter_context(lease.held(workdir))
            config, start = find_start(config, workdir)
            processor = run_processor(config, start.tokenizer)
            trainer = make_trainer(config, mesh)
            _check_exports(config, trainer)
            base = start.base if trainer.abstract.frozen else None
            hosts.first_then_others(lambda: create_workdir(workdir, config, start.tokenizer, base))
            checkpoints = stack.enter_context(contextlib.closing(RunCheckpoints(workdir, config.schedule.keep_checkpoints)))
            state = initial_state(config, trainer, checkpoints, start)
            keep(workdir, state.frozen)
            if hosts.is_first() and (changes := record_changes(workdir, config, base, int(state.step))):
                print(f"going on with other settings: {changes}", flush=True)
            print(describe(state), flush=True)
            model = MetaEmbed(model_config(config), state.network_parameters(), processor, mesh)
            items = hosts.first_then_others(lambda: run_items(config, processor, pairs))
            plan = hosts.first_then_others(lambda: stored_plan(items, config, workdir, silent=not hosts.is_first()))
        if not _train(config, trainer, state, items, plan, model, checkpoints, workdir, stop):
            return False
        with stop.at_once():
            _finish(config, trainer, checkpoints, model, workdir)
    return True


class _Pending:
    """The figures of the step before, fetched only after the next one is under way, so that the devices never wait."""

    def __init__(self, checkpoints: RunCheckpoints):
        self._checkpoints, self._step, self._figures = checkpoints, 0, None

    def fetch(self) -> dict[str, float]:
        """Waits for the step and returns its figures.

        Raises:
          UserError: the loss is not a number; names the step and the last good checkpoint.
        """
        if self._figures is None:
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

    def put(self, step: int, figures: dict) -> None:
        """Replaces the figures by those of `step`, which may still be computed."""
        self._step, self._figures = step, figures


def _train(
    config: RunConfig,
    trainer: Trainer,
    state: TrainState,
    items: RunItems,
    plan: RowPlan,
    model: MetaEmbed,
    checkpoints: RunCheckpoints,
    workdir: Path,
    stop: Stop,
) -> bool:
    first, mesh = int(state.step), trainer.mesh
    shape = plan.shape(config.rows.microbatch_rows, batch_shards(mesh))
    dataset = training_batches(items, shape, model.config.architecture.layout, rows_here(mesh, shape.size))
    writer = MetricsWriter(workdir, first, config.schedule.steps, silent=not hosts.is_first())
    validation = Validation(config, model, workdir, writer)
    pending, watch, trace = _Pending(checkpoints), Stopwatch(), Trace(config.schedule.trace_steps, workdir)
    speed, saves = Speed(config, shape, mesh, first), SaveSchedule(config.schedule.save_every, config.schedule.save_minutes)
    batches = iterate(dataset, first, config.schedule.steps, config.data.workers)
    train_step, accuracy = None, f"accuracy/{budget_name(config.objectives.budgets[-1])}"
    try:
        writer.say(plan.describe(shape))
        writer.write(first, plan.figures(shape))
        with saves.vote.watched():
            for step in range(first + 1, config.schedule.steps + 1):
                trace.before(step)
                # SIGTERM comes to all processes of a job, and ends workers that are not started up yet: those of the first batch.
                with watch.spending("input"), stop.at_once() if train_step is None else contextlib.nullcontext():
                    batch = next(batches)
                arrays = put_batch(batch, mesh)
                train_step = train_step or _compile(trainer, state, arrays, watch, writer)
                state, figures = train_step(state, arrays)
                pending.fetch()
                pending.put(step, figures)
                writer.advance()
                if step % config.schedule.log_every == 0 or step == config.schedule.steps:
                    _log(writer, step, pending.fetch() | items[step - 1].figures(shape), speed, watch.read(), accuracy)
                trace.after(step, pending.fetch)
                validate = step % config.evaluation.validate_every == 0 or step == config.schedule.steps
                stopping, saving = stop(), saves.due(step)
                if validate or stopping or saving:
                    pending.fetch()
                    with watch.spending("validation"):
                        metric = validation.run(state, step) if validate else None
                    with watch.spending("checkpoint"):
                        saves.begin()
                        writer.flush()  # before the checkpoint: a run that resumes from it has the lines up to it
                        checkpoints.save(step, state.parameters, state.optimizer, metric)
                    stopping = stop()  # SIGTERM may have come during the validation
                if stopping and step < config.schedule.steps:
                    checkpoints.wait()
                    writer.say(f"stopped by SIGTERM after step {step}, which is saved; the same command goes on from there")
                    return False
            checkpoints.wait()
            hosts.wait_for_all("trained")  # from here on, SIGTERM to one host ends all without a vote
        return True
    finally:
        batches.close()
        trace.close()
        writer.close()


def _log(writer: MetricsWriter, step: int, figures: dict[str, float], speed: Speed, spent: dict[str, float], accuracy: str) -> None:
    """Write the figures of a step and of the time since those before; show the accuracy of that name."""
    rates = speed.read(step, spent)
    writer.write(step, figures | rates | spent)
    writer.show(loss=figures["loss"], accuracy=figures[accuracy], **shown(rates))


def _compile(trainer: Trainer, state: TrainState, arrays: dict, watch: Stopwatch, writer: MetricsWriter) -> Callable:
    with watch.spending("compile"), announced("the training step"):
        train_step = trainer.step.lower(state, arrays).compile()
    writer.unpause()
    writer.say(f"compiled the training step in {watch.spent('compile'):.1f} s")
    return train_step


def _finish(config: RunConfig, trainer: Trainer, checkpoints: RunCheckpoints, model: MetaEmbed, workdir: Path) -> None:
    step = checkpoints.best_step()
    trained = checkpoints.restore_parameters(step, trainer.abstract.parameters)
    _, frozen = split(model.parameters, paths(trained))
    model.parameters = join(trained, frozen)
    evaluator, subject = HeldOut(config.data, "test", config.objectives.budgets), Subject.of_run(model, config, step)
    results = evaluator.run(subject, workdir, progress=hosts.is_first())
    if hosts.is_first():
        written = write_report(evaluator, subject, results, workdir, RUN)
        print(f"\n{workdir}: test split, best checkpoint (step {step})\n{format_tables(results)}", flush=True)
        print(f"\nwritten: {', '.join(map(str, written))}", flush=True)
        _export(config, workdir)
    hosts.wait_for_all("finished")


def _export(config: RunConfig, workdir: Path) -> None:
    if config.schedule.exports and jax.process_count() > 1:
        command = f"python -m metaembed_jax export --checkpoint={workdir} --format={config.schedule.exports[0]} --out=DIR"
        print(f"not exported, since there are several hosts; on one of them: {command}", flush=True)
        return
    for kind in config.schedule.exports:
        out = workdir / "export" / kind
        for part in filter(files.is_unfinished, out.parent.glob("*")):  # of a run that was killed here
            files.remove_folder(part)
        export(workdir, out, kind, replace=True)
        print(f"written: {out}", flush=True)
