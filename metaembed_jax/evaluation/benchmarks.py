"""Evaluators of benchmarks by name: those of a folder (`FOLDERS`), and all others from mteb."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.evaluator import Evaluator

# For each benchmark that is read from a folder, its module, its evaluator, and the meaning of --from. The evaluator is made of the
# folder and the budgets, which are pairs.
FOLDERS = {"mmeb": ("mmeb", "Mmeb", "the folder of MMEB-eval")}


def benchmark_evaluator(benchmark: str, directory: Path | None, budgets: Sequence) -> Evaluator:
    """Return the evaluator of a benchmark.

    Args:
      benchmark: a key of `FOLDERS`, or a name for `mteb.tasks.find`.
      directory: the folder of the benchmark; None for benchmarks of mteb.
      budgets: pairs; for mteb also searches in stages.

    Raises:
      UserError: a benchmark of a folder without one, or another benchmark with one.
    """
    if benchmark in FOLDERS:
        module, name, files = FOLDERS[benchmark]
        if directory is None:
            raise UserError(f"expected {files} (--from of eval)")
        return getattr(importlib.import_module(f"metaembed_jax.evaluation.{module}.evaluator"), name)(directory, budgets)
    if directory is not None:
        raise UserError(f"{directory} is not read: mteb fetches its own data; expected a folder for {', '.join(FOLDERS)} only")
    from metaembed_jax.evaluation.mteb.evaluator import Mteb

    return Mteb(benchmark, budgets)
