"""The evaluator of a held-out split of a run's sources, for validation during training and for the test at the end."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from metaembed_jax.config.run import DataConfig
from metaembed_jax.data import sources
from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.evaluator import Subject
from metaembed_jax.evaluation.failures import FailedQuery, with_items
from metaembed_jax.evaluation.metrics import METRICS, saturated_metrics
from metaembed_jax.evaluation.result_cache import key_of
from metaembed_jax.evaluation.scoring import StateScores, score_shares
from metaembed_jax.evaluation.sweep import MAIN, SECONDARY, Sweep, sweep
from metaembed_jax.late_interaction.groups import Budget, validate_budget
from metaembed_jax.late_interaction.stages import Stage, largest_budget
from metaembed_jax.results import Board, Failure, Interval, Results

LEGEND = (
    f"In percent, over all queries: {'; '.join(f'{name}, {metric.meaning}' for name, metric in METRICS.items())}. "
    "A budget is query vectors : document vectors (x numbers of a vector, if it is cut); the gain is the last one's over the first "
    "one's."
)


class HeldOut:
    """Evaluator of a split of some sources, in both directions.

    Args:
      data: names the sources, and the folder of all of them.
      split: "validation" or "test".
      budgets: to search at.
    """

    def __init__(self, data: DataConfig, split: str, budgets: Sequence[Sequence[int]]):
        self.name, self.budgets = split, [Budget(*budget) for budget in budgets]
        self._data_dir, self._sources = data.dir, list(dict.fromkeys(name for name, *_ in data.sources))

    def has_pairs(self) -> bool:
        """Return whether a source has pairs in the split.

        Raises:
          UserError: a source is not prepared.
        """
        return bool(sources.with_pairs(self._sources, self._data_dir, self.name))

    def check(self) -> None:
        """Refuse sources that are not prepared, or that all lack pairs in the split.

        Raises:
          UserError: names the sources.
        """
        if not self.has_pairs():
            raise UserError(
                f"{', '.join(self._sources)}: no source has {self.name} pairs; add pairs (of twenty, one is for validation and one "
                "for the test), or a source to config.data.sources"
            )

    def notes(self) -> list[str]:
        """Return a line for each fact about the split's sizes that its figures do not show.

        Raises:
          UserError: a source is not prepared.
        """
        present = sources.with_pairs(self._sources, self._data_dir, self.name)
        missing = [name for name in self._sources if name not in present]
        notes = [f"{self.name}: without rows in this split, and left out: {', '.join(missing)}"] if present and missing else []
        for name in present:
            sizes = sources.held_out_sizes(name, self._data_dir, self.name)
            if sizes and (metrics := saturated_metrics(sizes[1])):
                counts = f"{sizes[0]:,} queries and {sizes[1]:,} documents"
                notes.append(f"{self.name}: {name} has {counts}; {', '.join(metrics)} is 100 % for any model")
        return notes

    def tells_apart(self, metric: str) -> bool:
        """Return whether a metric can differ between models: a source has more documents than the metric looks at.

        Raises:
          UserError: a source is not prepared.
        """
        present = sources.with_pairs(self._sources, self._data_dir, self.name)
        sizes = [sources.held_out_sizes(name, self._data_dir, self.name) for name in present]
        return any(size is None or metric not in saturated_metrics(size[1]) for size in sizes)

    def run(self, subject: Subject, cache: Path, progress: bool) -> Results:
        """Encode each source once, at the largest budget, and score every budget in both directions.

        Each host encodes its share of the documents, and scores all queries against it on its devices.

        Raises:
          UserError: as `check`.
        """
        for budget in self.budgets:
            validate_budget(budget, subject.model.largest_budget)
        names = sources.with_pairs(self._sources, self._data_dir, self.name)
        left_out = [name for name in self._sources if name not in names]
        notes = (f"left out, without {self.name} pairs: {', '.join(left_out)}",) if left_out else ()
        evaluated = [self._evaluate(subject, name, progress) for name in names]
        sweeps, notes = [sweep for sweep, _ in evaluated], notes + tuple(note for _, note in evaluated if note)
        directions = zip(self._directions(), zip(*sweeps, strict=True), strict=True)
        board = partial(Board, measure=MAIN, secondary=SECONDARY, legend=LEGEND, total=len(self._sources), notes=notes)
        versions = [task.forward.data for task in sweeps]
        return Results(
            title=f"{', '.join(names)}, {self.name} split",
            model=subject.name,
            step=subject.step,
            data=f"{', '.join(names)}, {versions[0] if len(versions) == 1 else key_of(*versions)}",
            boards=tuple(board(name=name, tasks=tasks) for name, tasks in directions),
        )

    def figure_names(self) -> list[str]:
        """Return the names of all metrics."""
        return list(METRICS)

    def figures(self, results: Results) -> Mapping[str, Mapping[str, Interval]]:
        """Return the mean over sources of each metric, forward; if there are several, also the main metric of each source."""
        forward = results.boards[0]
        tasks = forward.tasks if forward.total > 1 else ()
        return {name: forward.mean(name) for name in METRICS} | {f"{task.name}/{task.metric}": task.values() for task in tasks}

    def show(self, failures: Sequence[Failure]) -> list[FailedQuery]:
        """Look up the items of failures.

        Raises:
          UserError: as `check`.
        """
        names = dict.fromkeys(failure.dataset for failure in failures)
        items = {name: sources.retrieval(name[0], self._data_dir, self.name) for name in names}
        return [with_items(failure, items[failure.dataset].queries, items[failure.dataset].documents) for failure in failures]

    def _directions(self) -> tuple[str, str]:
        """Return the names of the boards. In tasks of generated sources, queries are texts and documents are images."""
        generated = all(sources.generated_task(name, self._data_dir) for name in self._sources)
        return ("text→image", "image→text") if generated else ("query→document", "document→query")

    def _evaluate(self, subject: Subject, name: str, progress: bool) -> tuple[Sweep, str]:
        """Return the results of a source, and a note on them; empty for none."""
        task, model = sources.retrieval(name, self._data_dir, self.name), subject.model
        if progress and len(self._sources) > 1:
            print(f"{name}: {len(task.queries):,} queries, {len(task.documents):,} documents", flush=True)
        query_vectors, document_vectors = largest_budget([(Stage(budget),) for budget in self.budgets])
        if model.config.reads_states:  # a smaller number of vectors is a pooling of all
            document_vectors = model.config.vectors("document")
        query_QRD = model.encode_query(task.queries, budget=query_vectors, progress=progress)
        rows, document_nRD = model.encode_share(task.documents, "document", budget=document_vectors, progress=progress)
        fingerprint = sources.prepare(name, self._data_dir)["fingerprint"]
        facts = {"data": fingerprint, "documents": len(task.documents), "score": partial(_score, rows, len(task.documents))}
        if not model.config.reads_states:
            return sweep(name, query_QRD, document_nRD, task.relevance, self.budgets, **facts), ""
        states = StateScores(query_QRD, rows, document_nRD, len(task.documents))
        facts |= {"score": lambda _, __, budget: states.score(budget), "used": states.used}
        return sweep(name, query_QRD, document_nRD, task.relevance, self.budgets, **facts), f"{name}: {states.note()}"


def _score(
    rows: Int[np.ndarray, " n"],
    documents: int,
    query_QRD: Float[np.ndarray, "Q Rq D"],
    document_nRD: Float[np.ndarray, "n Rc D"],
    budget: Budget,
) -> Float[np.ndarray, "Q N"]:
    return score_shares(query_QRD, rows, document_nRD, documents, budget)
