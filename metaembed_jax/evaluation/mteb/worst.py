"""The queries of mteb's tasks that a model fails worst: chosen from the scores of all candidates, and shown with their items."""

import numpy as np
from jaxtyping import Bool

from metaembed_jax.evaluation.mteb.data import fetch_here, items_in
from metaembed_jax.evaluation.mteb.searcher import Scores, marked
from metaembed_jax.evaluation.worst import Example, Miss, Ranking, example, worst_of, worst_queries


def misses(task, judged: dict[str, dict[str, int]], scores: Scores) -> list[Miss]:
    """The worst queries, numbered as in `scores`.

    What is of a grade above 0 is right. A query that has no such candidate, among those that count for it, is left out.

    Args:
      judged: {query: {candidate: grade}}.
    """
    counted_QN = _counted(task, scores)
    right = {query: [candidate for candidate, grade in grades.items() if grade > 0] for query, grades in judged.items()}
    right_QN = counted_QN & marked(scores.queries, scores.candidates, right)
    rows = np.flatnonzero(right_QN.any(axis=1))
    rankings = (
        Ranking(np.flatnonzero(counted_N), scores_N[counted_N], right_N[counted_N])
        for scores_N, counted_N, right_N in ((scores.scores_QN[row], counted_QN[row], right_QN[row]) for row in rows)
    )
    return [miss._replace(query=int(rows[miss.query])) for miss in worst_queries(rankings)]


def _counted(task, scores: Scores) -> Bool[np.ndarray, "Q N"]:
    """Which candidates mteb ranks for a query: those asked about, but not itself or the first one, where the task says so."""
    counted_QN = scores.scores_QN > -np.inf
    if task.ignore_identical_ids:
        counted_QN &= ~marked(scores.queries, scores.candidates, {query: [query] for query in scores.queries})
    if task.skip_first_result and counted_QN.size:
        first_Q = np.where(counted_QN, scores.scores_QN, -np.inf).argmax(axis=1)
        counted_QN[np.arange(len(first_Q)), first_Q] = False
    return counted_QN


def examples(found: dict) -> list[Example]:
    """The worst queries of all tasks. Only their tasks are loaded again.

    Args:
      found: of each task what `run.evaluate_task` found.

    Raises:
      UserError: a task cannot be loaded.
    """
    worst = worst_of(
        (Miss(**one["miss"]), (task, one["split"], one["subset"])) for task, done in found.items() for one in done["worst"]
    )
    tasks = {task.metadata.name: task for _, (task, *_) in worst}
    for task in tasks.values():
        fetch_here(task)
    shown = [
        example(miss, *items_in(task, split, subset), f"{task.metadata.name}, {split}, {subset}")
        for miss, (task, split, subset) in worst
    ]
    for task in tasks.values():
        task.unload_data()
    return shown
