"""Evaluators of benchmarks by name: MMEB from a folder, all others from mteb."""

from collections.abc import Sequence
from pathlib import Path

from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.evaluator import Evaluator


def benchmark_evaluator(benchmark: str, directory: Path | None, budgets: Sequence) -> Evaluator:
    """Return the evaluator of a benchmark.

    Args:
      benchmark: "mmeb", or a name for `mteb.tasks.find`.
      directory: the folder of MMEB-eval; None for benchmarks of mteb.
      budgets: pairs; for mteb also searches in stages.

    Raises:
      UserError: MMEB without a folder, or another benchmark with one.
    """
    if benchmark == "mmeb":
        if directory is None:
            raise UserError("expected the folder of MMEB-eval (--from of eval)")
        from metaembed_jax.evaluation.mmeb.evaluator import Mmeb

        return Mmeb(directory, budgets)
    if directory is not None:
        raise UserError(f"{directory} is not read: mteb fetches its own data; expected a folder for mmeb only")
    from metaembed_jax.evaluation.mteb.evaluator import Mteb

    return Mteb(benchmark, budgets)
