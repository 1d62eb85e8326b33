"""Evaluates a model on tasks of mteb: every budget from one encoding, a finished task never again.

OUT/mteb/{task}.json        the scores at every budget, mteb's own figures, and of which model and data
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metaembed_jax import hosts
from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.budgets import search_name
from metaembed_jax.evaluation.mteb.searcher import Searcher
from metaembed_jax.evaluation.mteb.tasks import Benchmark
from metaembed_jax.evaluation.records import found_once
from metaembed_jax.late_interaction.stages import Stages, as_stages, largest_budget
from metaembed_jax.model import MetaEmbed

FIGURES = ("main_score", "ndcg_at_5", "ndcg_at_10")


def evaluate(
    model: MetaEmbed,
    name: str,
    identity: str,
    benchmarks: Sequence[Benchmark],
    budgets: Sequence,
    out: Path,
    progress: bool,
) -> str:
    """Evaluates every task, writes the files above, and returns the table.

    Args:
      name: of the model.
      identity: of the model: what was found for another one does not count.
      budgets: each as `as_stages` takes it.

    Raises:
      UserError: a budget beyond the model's, or data that cannot be fetched or makes no sense.
    """
    searches = [as_stages(budget, model.config.vectors("query"), model.config.vectors("candidate")) for budget in budgets]
    searcher = Searcher(model, largest_budget(searches), name=name, revision=identity[:16], progress=progress)
    names = sorted(map(search_name, searches))
    tables, private = [], []
    for benchmark in benchmarks:
        found = {}
        for task in benchmark.tasks:
            key = hashlib.sha256(repr((identity, task.metadata.name, task.metadata.revision, names)).encode()).hexdigest()[:16]

            def find(task=task) -> dict:
                return evaluate_task(searcher, task, searches)

            try:
                found[task.metadata.name] = found_once(out / "mteb" / f"{task.metadata.name}.json", key, find)
            except PrivateTask as error:
                private.append(f"left out: {error}")
        tables.append(format_table(benchmark, found, searches))
    if len(private) == sum(len(benchmark.tasks) for benchmark in benchmarks):
        raise UserError(private[0])
    return "\n\n".join([*tables, *private])


def evaluate_task(searcher: Searcher, task, searches: Sequence[Stages]) -> dict:
    """{"task", "revision", "mteb", "main_score": the name of it, "searches": {"r_q:r_c": {figure: mean over splits and subsets}}}.

    Raises:
      UserError: the data cannot be fetched (`PrivateTask`, if that is why), or makes no sense.
    """
    from mteb import TaskResult

    fetch(task)
    scores: dict[str, dict] = {search_name(stages): {split: {} for split in task.eval_splits} for stages in searches}
    for split in task.eval_splits:
        for subset in task.hf_subsets:  # outside of the searches, so that its vectors serve all of them
            if searcher.progress:
                print(f"{task.metadata.name}, {split}, {subset}", flush=True)
            for stages in searches:
                found = task.evaluate(searcher.at(stages), split, subsets_to_run=[subset], encode_kwargs={})
                scores[search_name(stages)][split] |= found
    task.unload_data()
    results = {name: TaskResult.from_task_results(task, splits, evaluation_time=0) for name, splits in scores.items()}

    def mean(result, figure: str) -> float:
        return float(result.get_score(getter=lambda values: values[figure]))

    return {
        "task": task.metadata.name,
        "revision": task.metadata.revision,
        "mteb": next(iter(results.values())).mteb_version,
        "main_score": task.metadata.main_score,
        "searches": {name: {figure: mean(result, figure) for figure in FIGURES} for name, result in results.items()},
    }


class PrivateTask(UserError):
    """The data of a task is not for everyone."""


def fetch(task) -> None:
    """Loads the data of a task: one host fetches it, where all share a cache.

    Raises:
      PrivateTask: it is not public, and not to be had.
      UserError: it cannot be fetched.
    """
    problem = hosts.first_then_others(lambda: _load(task))
    of_first = hosts.from_first(problem or "")  # what is left out must be so on all hosts
    place = f"{task.metadata.name}: {task.metadata.dataset['path']} at {task.metadata.revision}"
    if of_first and task.metadata.is_public is False:
        raise PrivateTask(f"{place} is not public ({of_first})")
    if problem:
        raise UserError(f"{place} cannot be fetched from the Hugging Face hub ({problem}); it must be there, or in its cache")


def _load(task) -> str | None:
    """What went wrong, if something did."""
    try:
        task.load_data()
    except Exception as error:  # of the network, the hub, a token, or the data: each has errors of its own
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None


def format_table(benchmark: Benchmark, found: dict[str, dict], searches: Sequence[Stages]) -> str:
    """Tasks and their mean, the main score of each in percent at every budget."""
    names = list(map(search_name, searches))
    lines = [(benchmark.name, "main score (%)", *names)]
    rows = {task: [100 * done["searches"][name]["main_score"] for name in names] for task, done in found.items()}
    lines += [(task, found[task]["main_score"], *(f"{value:.1f}" for value in row)) for task, row in rows.items()]
    total = len(benchmark.tasks) + len(benchmark.others)
    if rows:
        means = np.mean(list(rows.values()), axis=0)
        lines.append((f"mean of {len(rows)} of {total} tasks", "", *(f"{value:.1f}" for value in means)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join([task.ljust(widths[0]), metric.ljust(widths[1]), *map(str.rjust, values, widths[2:])]).rstrip()
        for task, metric, *values in lines
    ]
    if benchmark.others:
        table.append(f"not retrieval of texts and images: {', '.join(benchmark.others)}")
    return "\n".join(table)
