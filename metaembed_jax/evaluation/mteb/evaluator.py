"""The evaluator of mteb's benchmarks. It encodes once for all budgets, and skips finished tasks.

CACHE/mteb/{task}.json   results of a task, and the key of its model and data
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.cost import index_bytes, maxsim_flops
from metaembed_jax.evaluation.evaluator import Subject
from metaembed_jax.evaluation.failures import FailedQuery, with_items, worst_of
from metaembed_jax.evaluation.mteb.data import PrivateTask, fetch, fetch_here, items_in
from metaembed_jax.evaluation.mteb.failures import task_failures
from metaembed_jax.evaluation.mteb.searcher import Searcher
from metaembed_jax.evaluation.mteb.tasks import Benchmark, find
from metaembed_jax.evaluation.result_cache import cached, key_of
from metaembed_jax.late_interaction.budgets import by_cost, in_order, search_name
from metaembed_jax.late_interaction.stages import Stages, as_stages, largest_budget
from metaembed_jax.results import Board, Failure, Interval, Results, SearchResults, TaskResults

METRICS = ("ndcg_at_5", "ndcg_at_10")  # in addition to each task's main score
MEASURE = "main score"
LEFT_OUT = "left out: "
LEGEND = "The main score of each task, by mteb's definition and name."


class Mteb:
    """Evaluator of benchmarks of mteb.

    Args:
      benchmark: as in `tasks.find`.
      budgets: each as in `as_stages`.
    """

    name = "mteb"

    def __init__(self, benchmark: str, budgets: Sequence[Sequence]):
        self.benchmark, self.budgets = benchmark, budgets

    @cached_property
    def benchmarks(self) -> list[Benchmark]:
        """The benchmarks of this name."""
        return find(self.benchmark)

    def check(self) -> None:
        """Refuse a name that mteb does not know, or whose tasks are not searches.

        Raises:
          UserError: as `tasks.find`.
        """
        _ = self.benchmarks

    def run(self, subject: Subject, cache: Path, progress: bool) -> Results:
        """Evaluate every task except private ones that cannot be fetched.

        Raises:
          UserError: a budget beyond the model's, or data that cannot be fetched or is malformed.
        """
        model = subject.model
        searches = in_order((as_stages(budget, model.largest_budget) for budget in self.budgets), model.dimension)
        largest, revision = largest_budget(searches), subject.identity[:16]
        searcher = Searcher(model, largest, name=subject.name, revision=revision, progress=progress)
        boards = [self._evaluate(searcher, subject.identity, benchmark, searches, cache) for benchmark in self.benchmarks]
        if not any(board.tasks for board in boards):
            raise UserError(next(note for board in boards for note in board.notes if note.startswith(LEFT_OUT)))
        import mteb

        titles, tasks = [board.name for board in boards], [task for board in boards for task in board.tasks]
        data = f"mteb {mteb.__version__}, {key_of([(task.name, task.data) for task in tasks])}"
        return Results(title=", ".join(titles), model=subject.name, step=subject.step, data=data, boards=tuple(boards))

    def figure_names(self) -> list[str]:
        """Return the names of the benchmarks."""
        return [benchmark.name for benchmark in self.benchmarks]

    def figures(self, results: Results) -> Mapping[str, Mapping[str, Interval]]:
        """Return the mean main score of each benchmark."""
        return {board.name: board.mean() for board in results.boards}

    def show(self, failures: Sequence[Failure]) -> list[FailedQuery]:
        """Look up the items of failures; only their tasks are loaded.

        Raises:
          UserError: a task cannot be loaded.
        """
        names = {failure.dataset[0] for failure in failures}
        tasks = {
            task.metadata.name: task for benchmark in self.benchmarks for task in benchmark.tasks if task.metadata.name in names
        }
        for task in tasks.values():
            fetch_here(task)
        shown = [with_items(failure, *items_in(tasks[failure.dataset[0]], *failure.dataset[1:])) for failure in failures]
        for task in tasks.values():
            task.unload_data()
        return shown

    def _evaluate(self, searcher: Searcher, identity: str, benchmark: Benchmark, searches: Sequence[Stages], cache: Path) -> Board:
        results, notes = [], []
        if benchmark.others:
            notes.append(f"not retrieval of texts and images: {', '.join(benchmark.others)}")
        for task in benchmark.tasks:
            name, data = task.metadata.name, (task.metadata.revision, list(task.eval_splits), list(task.hf_subsets))
            key = key_of(identity, name, *data, sorted(map(search_name, searches)))
            try:
                results.append(cached(cache / self.name / f"{name}.json", key, partial(evaluate_task, searcher, task, searches)))
            except PrivateTask as error:
                notes.append(f"{LEFT_OUT}{error}")
        total = len(benchmark.tasks) + len(benchmark.others)
        return Board(name=benchmark.name, measure=MEASURE, legend=LEGEND, tasks=tuple(results), total=total, notes=tuple(notes))


def evaluate_task(searcher: Searcher, task: Any, searches: Sequence[Stages]) -> TaskResults:
    """Fetch one task and search it at every budget; the means are over its splits and subsets.

    Raises:
      UserError: the data cannot be fetched (`PrivateTask` if it is private), or is malformed.
    """
    from mteb import TaskResult

    fetch(task)
    scores: dict[str, dict] = {search_name(stages): {split: {} for split in task.eval_splits} for stages in searches}
    queries, documents, failures = 0, 0, []
    for split, subset in itertools.product(task.eval_splits, task.hf_subsets):  # all searches of a subset use the same vectors
        results = _evaluate_subset(searcher, task, split, subset, searches)
        for name, subset_scores in results.scores.items():
            scores[name][split] |= subset_scores
        queries, documents, failures = queries + results.queries, documents + results.documents, failures + results.failures
    task.unload_data()
    task_results = {name: TaskResult.from_task_results(task, splits, evaluation_time=0) for name, splits in scores.items()}
    return TaskResults(
        name=task.metadata.name,
        metric=task.metadata.main_score,
        queries=queries,
        documents=documents,
        dimension=searcher.model.dimension,
        data=f"revision {task.metadata.revision}",
        searches=tuple(_search_results(searcher, task, stages, task_results[search_name(stages)]) for stages in searches),
        failures=tuple(worst_of(failures)),
    )


def _search_results(searcher: Searcher, task: Any, stages: Stages, result: Any) -> SearchResults:
    def mean(key: str) -> Interval:
        return Interval(float(result.get_score(getter=lambda values: values[key])))

    metrics = {name: mean(name) for name in METRICS} | {task.metadata.main_score: mean("main_score")}
    *earlier, (budget, _) = stages
    if earlier:
        return SearchResults(budget=search_name(stages), metrics=metrics)
    flops, size = (cost(budget, searcher.model.dimension) for cost in (maxsim_flops, index_bytes))
    return SearchResults(budget=search_name(stages), flops_per_document=flops, bytes_per_document=size, metrics=metrics)


class SubsetResults(NamedTuple):
    """Results of one subset of one split.

    Attributes:
      scores: mteb's scores, for each search.
      queries, documents: the numbers of those that mteb does not leave out.
      failures: the worst queries, by their numbers in the data.
    """

    scores: dict[str, dict]
    queries: int
    documents: int
    failures: list[Failure]


def _evaluate_subset(searcher: Searcher, task: Any, split: str, subset: str, searches: Sequence[Stages]) -> SubsetResults:
    if searcher.progress:
        print(f"{task.metadata.name}, {split}, {subset}", flush=True)
    data, results = task.dataset[subset][split], {}
    numbers = {query: number for number, query in enumerate(data["queries"]["id"])}
    indexed = searcher
    for stages in searches:
        indexed = searcher.at(stages)
        results[search_name(stages)] = task.evaluate(indexed, split, subsets_to_run=[subset], encode_kwargs={})
    # mteb has now left out queries without relevant documents. Rankings need all scores, and searches return the best ones only;
    # scoring again costs little compared with encoding.
    largest = by_cost((stages[-1].budget for stages in searches), searcher.model.dimension)[-1]
    scores = indexed.score(data["queries"], largest, task_metadata=task.metadata, top_ranked=data["top_ranked"])
    failures = [
        replace(failure, dataset=(task.metadata.name, split, subset), query=numbers[scores.queries[failure.query]])
        for failure in task_failures(task, data["relevant_docs"], scores)
    ]
    return SubsetResults(results, len(data["queries"]), len(data["corpus"]), failures)
