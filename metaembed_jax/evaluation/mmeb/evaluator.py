"""The evaluator of MMEB, on the tasks in a folder. It encodes once for all budgets, and skips finished tasks.

CACHE/mmeb/{task}.json               results of a task, and the key of its model and data
CACHE/mmeb/embeddings/{task}-*.npz   vectors at the largest budget, until the task is finished
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from metaembed_jax import hosts
from metaembed_jax.data.sources.image_files import ImageFolder
from metaembed_jax.evaluation.cost import index_bytes, maxsim_flops
from metaembed_jax.evaluation.evaluator import Subject
from metaembed_jax.evaluation.failures import FailedQuery, Ranking, with_items, worst_queries
from metaembed_jax.evaluation.mmeb.published import PUBLISHED
from metaembed_jax.evaluation.mmeb.reading import Questions, available, read_task
from metaembed_jax.evaluation.mmeb.tasks import TASKS, Task
from metaembed_jax.evaluation.result_cache import cached, key_of
from metaembed_jax.evaluation.scoring import score_shares
from metaembed_jax.files import replacing
from metaembed_jax.hosts.shares import join_shares
from metaembed_jax.late_interaction.budgets import budget_name, by_cost
from metaembed_jax.late_interaction.groups import Budget, validate_budget
from metaembed_jax.late_interaction.stages import Stage, largest_budget
from metaembed_jax.model import MetaEmbed
from metaembed_jax.results import Board, Failure, Interval, Results, SearchResults, TaskResults

MEASURE = "Precision@1"
LEGEND = "Share of queries whose right document scores above all others that they choose among; means are over tasks."
IN_DOMAIN, OUT_OF_DOMAIN = "in domain", "out of domain"


class Mmeb:
    """Evaluator of MMEB.

    Args:
      directory: the folder of MMEB-eval.
      budgets: to search at.
    """

    name = "mmeb"

    def __init__(self, directory: Path, budgets: Sequence[Sequence[int]]):
        self.directory, self.budgets = directory, [Budget(*budget) for budget in budgets]
        self._questions: dict[str, Questions] = {}

    def check(self) -> None:
        """Refuse a folder without tasks.

        Raises:
          UserError: names the folder.
        """
        available(self.directory, TASKS)

    def run(self, subject: Subject, cache: Path, progress: bool) -> Results:
        """Evaluate every task in the folder.

        Raises:
          UserError: files that are missing or malformed, or a budget beyond the model's.
        """
        tasks, results = available(self.directory, TASKS), []
        for budget in self.budgets:
            validate_budget(budget, subject.model.largest_budget)
        for task in tasks:
            questions = read_task(task, self.directory)
            key = key_of(subject.identity, questions.fingerprint, sorted(budget.sizes for budget in self.budgets))
            vectors = cache / self.name / "embeddings" / f"{task.name}-{key}"
            evaluate = partial(evaluate_task, subject.model, task, questions, self.budgets, vectors, progress)
            results.append(cached(cache / self.name / f"{task.name}.json", key, evaluate))
            self._questions[task.name] = questions._replace(choices=[])  # they take most of a task's memory
        board = Board(
            name="MMEB",
            measure=MEASURE,
            legend=LEGEND,
            tasks=tuple(results),
            total=len(TASKS),
            groups=_groups(tasks),
            drawn=tuple(name for name in (IN_DOMAIN, OUT_OF_DOMAIN) if name in _groups(tasks)),
            published=PUBLISHED,
        )
        data = f"MMEB, {key_of([(task.name, task.data) for task in results])}"
        return Results(title="MMEB", model=subject.name, step=subject.step, data=data, boards=(board,))

    def figure_names(self) -> list[str]:
        """Return the name of the benchmark's metric."""
        return [MEASURE]

    def figures(self, results: Results) -> Mapping[str, Mapping[str, Interval]]:
        """Return the mean over all tasks."""
        return {MEASURE: results.boards[0].mean()}

    def show(self, failures: Sequence[Failure]) -> list[FailedQuery]:
        """Look up the items of failures; only their images are read."""
        return [with_items(failure, *pictured(self._questions[failure.dataset[0]])) for failure in failures]


def _groups(tasks: Sequence[Task]) -> dict[str, tuple[str, ...]]:
    """Return the names of the tasks of each mean, without empty groups."""
    kinds = dict.fromkeys(task.group for task in tasks)
    groups = {kind: tuple(task.name for task in tasks if task.group == kind) for kind in kinds}
    groups[IN_DOMAIN] = tuple(task.name for task in tasks if task.in_domain)
    groups[OUT_OF_DOMAIN] = tuple(task.name for task in tasks if not task.in_domain)
    return {name: members for name, members in groups.items() if members}


def evaluate_task(
    model: MetaEmbed, task: Task, questions: Questions, budgets: Sequence[Budget], cache: Path, progress: bool
) -> TaskResults:
    """Encode one task, or read its vectors, and score every budget.

    Args:
      cache: path prefix of the files of the vectors, which are removed at the end.
    """
    if progress:
        print(f"{task.name}: {len(questions.queries):,} queries, {len(questions.documents):,} documents", flush=True)
    query_vectors, document_vectors = largest_budget([(Stage(budget),) for budget in budgets])
    queries, documents = pictured(questions)
    query_rows, query_nRD = _encode(model, queries, "query", query_vectors, cache, progress)
    rows, document_nRD = _encode(model, documents, "document", document_vectors, cache, progress)
    query_QRD = join_shares(query_rows, query_nRD, len(queries))
    dimension, searches, scores_QN = query_QRD.shape[2], [], np.zeros((len(queries), len(documents)))
    for budget in by_cost(budgets, dimension):
        scores_QN = score_shares(query_QRD, rows, document_nRD, len(documents), budget)
        precision = Interval(float(first_choices(scores_QN, questions.choices).mean()))
        flops, size = maxsim_flops(budget, dimension), index_bytes(budget, dimension)
        searches.append(
            SearchResults(
                budget=budget_name(budget), flops_per_document=flops, bytes_per_document=size, metrics={MEASURE: precision}
            )
        )
    failures = worst_queries(map(_ranking, scores_QN, questions.choices), (task.name,))  # at the last, largest budget
    for file in cache.parent.glob(f"{cache.name}-*") if hosts.is_first() else ():
        file.unlink()
    return TaskResults(
        name=task.name,
        metric=MEASURE,
        queries=len(queries),
        documents=len(documents),
        dimension=dimension,
        data=questions.fingerprint,
        searches=tuple(searches),
        chance=float(np.mean([1 / len(choices) for choices in questions.choices])),
        failures=failures,
    )


def _ranking(scores_N: Float[np.ndarray, " N"], choices: Sequence[int]) -> Ranking:
    return Ranking(np.array(choices), scores_N[choices], np.arange(len(choices)) == 0)


def first_choices(scores_QN: Float[np.ndarray, "Q N"], choices: Sequence[Sequence[int]]) -> Bool[np.ndarray, " Q"]:
    """Return whether each query's right document, the first of its choices, scores above all other choices.

    A tie counts as wrong. A query without other choices counts as right.
    """
    return np.array([(row[numbers[0]] > row[numbers[1:]]).all() for row, numbers in zip(scores_QN, choices, strict=True)])


class Pictured(Sequence):
    """Items whose images are read on access."""

    def __init__(self, items: list[dict], images: ImageFolder):
        self.items, self.images = items, images

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> dict:
        item = self.items[number]
        return item | {"image": self.images.image(item["image"], "image")} if "image" in item else item


def pictured(questions: Questions) -> tuple[Pictured, Pictured]:
    """Return queries and documents as items with images."""
    return Pictured(questions.queries, questions.images), Pictured(questions.documents, questions.images)


def _encode(
    model: MetaEmbed, items: Pictured, side: str, budget: int, cache: Path, progress: bool
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n R D"]]:
    """Return this host's rows and their vectors, from the cache if it has them."""
    path = cache.with_name(f"{cache.name}-{side}-{jax.process_index()}-of-{jax.process_count()}.npz")
    if path.is_file():
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return stored["rows"], stored["vectors"]
    rows, vectors = model.encode_share(items, side, budget=budget, progress=progress)
    with replacing(path) as file:
        np.savez(file, rows=rows, vectors=vectors)
    return rows, vectors
