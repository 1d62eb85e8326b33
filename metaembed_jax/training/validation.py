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

CACHE = "eval"  # the folder of a run with results of finished tasks, the same as that of `eval.py`


def validators(config: RunConfig) -> list[Evaluator]:
    """Return the evaluators of a run's checkpoints: the validation split, and `config.evaluation.evaluations`.

    Raises:
      UserError: a benchmark is unknown or has no data, or `config.evaluation.select` is not a figure of theirs; names the key.
    """
    budgets = config.objectives.budgets
    evaluators: list[Evaluator] = [HeldOut(config.data, "validation", budgets)]
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
        self._evaluators = validators(config)

    def run(self, state: TrainState, step: int) -> float:
        """Evaluate the parameters after a step, and return the figure that selects the best checkpoint.

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
        self._writer.write(step, figures)
        select = self._config.evaluation.select
        selected = f"{select}/{budget_name(self._config.objectives.budgets[-1])}"
        if selected not in figures:  # all data of a benchmark is private
            raise UserError(f"config.evaluation.select={select!r}: none of its tasks could be evaluated; choose another figure")
        return figures[selected]
