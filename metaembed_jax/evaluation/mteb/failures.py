"""Choose the worst failures of a model in mteb's tasks, from the scores of all documents."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool

from metaembed_jax.evaluation.failures import Ranking, worst_queries
from metaembed_jax.evaluation.mteb.scores import Scores, marked
from metaembed_jax.results import Failure


def task_failures(task: Any, judged: Mapping[str, Mapping[str, int]], scores: Scores) -> list[Failure]:
    """Choose the worst queries, numbered as in `scores`.

    Documents of a grade above 0 are right. Queries without a right document among those that mteb ranks are left out.

    Args:
      judged: {query: {document: grade}}.
    """
    counted_QN = _counted(task, scores)
    right = {query: [document for document, grade in grades.items() if grade > 0] for query, grades in judged.items()}
    right_QN = counted_QN & marked(scores.queries, scores.documents, right)
    rows = np.flatnonzero(right_QN.any(axis=1))
    rankings = (
        Ranking(np.flatnonzero(counted_N), scores_N[counted_N], right_N[counted_N])
        for scores_N, counted_N, right_N in ((scores.scores_QN[row], counted_QN[row], right_QN[row]) for row in rows)
    )
    return [replace(failure, query=int(rows[failure.query])) for failure in worst_queries(rankings)]


def _counted(task: Any, scores: Scores) -> Bool[np.ndarray, "Q N"]:
    """Mark the documents that mteb ranks for each query: those with a score.

    By the settings of the task, the document of the same id or the first document is not ranked.
    """
    counted_QN = scores.scores_QN > -np.inf
    if task.ignore_identical_ids:
        counted_QN &= ~marked(scores.queries, scores.documents, {query: [query] for query in scores.queries})
    if task.skip_first_result and counted_QN.size:
        first_Q = np.where(counted_QN, scores.scores_QN, -np.inf).argmax(axis=1)
        counted_QN[np.arange(len(first_Q)), first_Q] = False
    return counted_QN
