"""Benchmarks by name: MMEB from a folder, all others from mteb."""

from collections.abc import Sequence
from pathlib import Path

from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.evaluator import Evaluator


def benchmark_evaluator(benchmark: str, directory: Path | None, budgets: Sequence) -> Evaluator:
    """Return the evaluator of a benchmark.

    Args:
      benchmark: mmeb, or a name that `mteb.tasks.find` knows.
      directory: the folder that MMEB-eval was fetched to; None for benchmarks of mteb.
      budgets: pairs, and for mteb searches in stages too.

    Raises:
      UserError: a folder that is missing, or one that nothing reads.
    """
    if benchmark == "mmeb":
        if directory is None:
            raise UserError("expected a folder (--from of eval), the one that MMEB-eval was fetched to")
        from metaembed_jax.evaluation.mmeb.evaluator import Mmeb

        return Mmeb(directory, budgets)
    if directory is not None:
        raise UserError(f"{directory} is not read: only mmeb is in a folder, and mteb fetches its own data")
    from metaembed_jax.evaluation.mteb.evaluator import Mteb

    return Mteb(benchmark, budgets)
