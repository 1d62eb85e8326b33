"""Validation during training: the held-out split and benchmarks, and the figure that selects the best checkpoint."""

from pathlib import Path

from metaembed_jax.config.run import RunConfig
from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.benchmarks import benchmark_evaluator
from metaembed_jax.evaluation.evaluator import Evaluator, Subject
from metaembed_jax.evaluation.held_out import HeldOut
from metaembed_jax.late_interaction.budgets import budget_name
from metaembed_jax.model import MetaEmbed
from metaembed_jax.training.metrics import MetricsWriter
from metaembed_jax.training.step import TrainState

SPLIT = "validation"
CACHE = "eval"  # the folder of a run with results of finished tasks, the same as that of `eval.py`


def print_held_out(config: RunConfig) -> None:
    """Print what a run cannot learn from its held-out splits, before its first step.

    Raises:
      UserError: a source is not prepared.
    """
    names, select = ", ".join(dict.fromkeys(name for name, *_ in config.data.sources)), config.evaluation.select
    validation, test = (HeldOut(config.data, split, config.objectives.budgets) for split in (SPLIT, "test"))
    figure = select.removeprefix(f"{SPLIT}/")
    if not validation.has_pairs():
        best = "; the last checkpoint is the best" if figure != select else ""
        print(f"validation: {names} has no validation rows (a twentieth of a source is held out){best}", flush=True)
    elif figure != select and not validation.tells_apart(figure):
        print(
            f"validation: config.evaluation.select={select!r} is the same for every model; the last checkpoint is the best",
            flush=True,
        )
    if not test.has_pairs():
        print(f"test: {names} has no test rows; the run writes no results", flush=True)
    for line in (*validation.notes(), *test.notes()):
        print(line, flush=True)


def validators(config: RunConfig) -> list[Evaluator]:
    """Return the evaluators of a run's checkpoints: the validation split, and `config.evaluation.evaluations`.

    Raises:
      UserError: a benchmark is unknown or has no data, or `config.evaluation.select` is not a figure of theirs; names the key.
    """
    budgets = config.objectives.budgets
    evaluators: list[Evaluator] = [HeldOut(config.data, SPLIT, budgets)]
    for benchmark, directory in config.evaluation.evaluations:
        try:
            evaluators.append(benchmark_evaluator(benchmark, Path(directory) if directory else None, budgets))
            evaluators[-1].check()
        except UserError as error:
            raise UserError(f"config.evaluation.evaluations: {benchmark!r}: {error}") from error
    names = [f"{evaluator.name}/{figure}" for evaluator in evaluators for figure in evaluator.figure_names()]
    if (select := config.evaluation.select) not in names:
        raise UserError(f"config.evaluation.select={select!r}: expected {' or '.join(names)}")
    return evaluators


class Validation:
    """Evaluates checkpoints of a run, and writes their figures.

    Args:
      model: its parameters are replaced by those of each checkpoint.
      workdir: the folder of the run.

    Raises:
      UserError: as `validators`.
    """

    def __init__(self, config: RunConfig, model: MetaEmbed, workdir: Path, writer: MetricsWriter):
        self._config, self._model, self._cache, self._writer = config, model, workdir / CACHE, writer
        evaluators = validators(config)
        self._evaluators = [each for each in evaluators if not isinstance(each, HeldOut) or each.has_pairs()]

    def run(self, state: TrainState, step: int) -> float | None:
        """Evaluate the parameters after a step, and return the figure that selects the best checkpoint; None without one.

        Raises:
          UserError: as `Evaluator.run`.
        """
        self._model.parameters = state.network_parameters()
        subject, figures = Subject.of_run(self._model, self._config, step), {}
        for evaluator in self._evaluators:
            results = evaluator.run(subject, self._cache, progress=False)
            for figure, values in evaluator.figures(results).items():
                figures |= {f"{evaluator.name}/{figure}/{budget}": interval.mean for budget, interval in values.items()}
            for board in results.boards:
                means = ", ".join(f"{budget} {100 * interval.mean:.1f}" for budget, interval in board.mean().items())
                self._writer.print(f"step {step}: {evaluator.name} {board.measure} of {board.name} at {means}")
        if figures:
            self._writer.write(step, figures)
        select = self._config.evaluation.select
        selected = f"{select}/{budget_name(self._config.objectives.budgets[-1])}"
        if selected not in figures:
            if select.startswith(f"{SPLIT}/"):  # it has no pairs; a benchmark lacks its figure if all its data is private
                return None
            raise UserError(f"config.evaluation.select={select!r}: none of its tasks could be evaluated; choose another figure")
        return figures[selected]
