"""Results of an evaluation: tasks, their searches, the metrics of each search; as dataclasses, and as JSON in a file.

JSON has the fields of the dataclasses that are not None, and the means of each board.
"""

import dataclasses
import os
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from metaembed_jax import files
from metaembed_jax.errors import UserError


@dataclass(frozen=True)
class Interval:
    """A mean, as a fraction of 1, and the ends of its 95 % bootstrap interval (None: not computed)."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class SearchResults:
    """Metrics of a task that was searched at one budget, or in stages.

    Attributes:
      budget: as in flags, "4:8" or "1:1:1000>16:64".
      flops_per_document, bytes_per_document: of MaxSim and of the index; None of a search in stages.
      metrics: by name.
    """

    budget: str
    flops_per_document: int | None = None
    bytes_per_document: int | None = None
    metrics: Mapping[str, Interval]


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Paired differences between the metrics of the largest and the smallest budget."""

    smallest: str
    largest: str
    metrics: Mapping[str, Interval]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A query that ranks a wrong document before all right ones, in numbers.

    Attributes:
      dataset: the source or task, and its parts, in which items are numbered.
      query: its number.
      rank: of its first right document, from 0; after all others of equal score, as in `metrics.gold_of`.
      among: the number of documents that were searched.
      right: (document, score) of some right documents, best first.
      above: the same for wrong documents that rank before them.
    """

    dataset: tuple[str, ...] = ()
    query: int
    rank: int
    among: int
    right: tuple[tuple[int, float], ...]
    above: tuple[tuple[int, float], ...]

    @property
    def severity(self) -> tuple[int, float]:
        """Sort key of failures, largest for the worst: the rank, then the difference of scores to the first document."""
        return severity(self.rank, self.right[0][1], self.above[0][1])


def severity(rank: int, right: float, first: float) -> tuple[int, float]:
    """Return `Failure.severity`, given the rank, the best right score and the first wrong score."""
    return rank, 0.0 if first == right else first - right  # equal infinities have no difference


@dataclass(frozen=True, kw_only=True)
class TaskResults:
    """Results of one search task.

    Attributes:
      name: of the task.
      metric: the main one, a key of each search's metrics.
      queries, documents: their numbers.
      dimension: width of a vector.
      data: version of the searched data.
      searches: cheapest first, then those in stages.
      gain: None for a single budget, or if metrics have no intervals.
      chance: the main metric of guesses, if known.
      failures: the worst at the largest budget.
    """

    name: str
    metric: str
    queries: int
    documents: int
    dimension: int
    data: str
    searches: tuple[SearchResults, ...]
    gain: Gain | None = None
    chance: float | None = None
    failures: tuple[Failure, ...] = ()

    def values(self, metric: str = "") -> dict[str, Interval]:
        """Return a metric at each budget, by default the main one."""
        return {search.budget: search.metrics[metric or self.metric] for search in self.searches}

    def is_like_chance(self) -> bool:
        """Return whether the best search is within two standard deviations of guessing."""
        if self.chance is None or self.chance >= 1:
            return False
        best = max(interval.mean for interval in self.values().values())
        return best <= self.chance + 2 * (self.chance * (1 - self.chance) / self.queries) ** 0.5


@dataclass(frozen=True, kw_only=True)
class Board:
    """Tasks that are shown together, and their means.

    Attributes:
      name: of the benchmark, or of the direction in which sources are searched.
      measure: the tasks' main metric.
      secondary: another metric of all tasks, for the plot; empty for none.
      legend: how to read the numbers.
      tasks: all have the same searches; empty if all data of the board is private.
      total: tasks of the board, including those that are left out.
      groups: the tasks of further means, by name.
      drawn: groups that the plot shows next to all tasks.
      published: means of all tasks that others report, by budget.
      notes: lines for the reader.
    """

    name: str
    measure: str
    secondary: str = ""
    legend: str
    tasks: tuple[TaskResults, ...]
    total: int
    groups: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    drawn: tuple[str, ...] = ()
    published: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def mean(self, metric: str = "", group: str = "") -> dict[str, Interval]:
        """Return a metric's mean over tasks at each budget, by default of the main metrics; for a single task, its interval."""
        tasks = [task.values(metric) for task in self.tasks if not group or task.name in self.groups[group]]
        if len(tasks) == 1:
            return tasks[0]
        budgets = tasks[0] if tasks else {}
        return {budget: Interval(float(np.mean([task[budget].mean for task in tasks]))) for budget in budgets}

    def means(self) -> dict[str, dict[str, Interval]]:
        """Return the mean of each group, and then of all tasks."""
        return {group: self.mean(group=group) for group in self.groups} | {"all": self.mean()}


@dataclass(frozen=True, kw_only=True)
class Results:
    """Results of one evaluation of one model.

    Attributes:
      title: of the evaluated data.
      model: name of its config.
      step: of its checkpoint.
      data: version of all searched data.
      boards: at least one; the mean of the first is the headline.
    """

    title: str
    model: str
    step: int
    data: str
    boards: tuple[Board, ...]

    def tasks(self) -> list[TaskResults]:
        """The tasks of all boards."""
        return [task for board in self.boards for task in board.tasks]


def to_json(results: Any) -> Any:
    """Return a dataclass of this module as JSON's types."""
    if isinstance(results, Mapping):
        return {key: to_json(value) for key, value in results.items()}
    if isinstance(results, tuple):
        return [to_json(value) for value in results]
    if not dataclasses.is_dataclass(results):
        return results
    pairs = {field.name: getattr(results, field.name) for field in dataclasses.fields(results)}
    pairs |= {"means": results.means()} if isinstance(results, Board) else {}
    return {name: to_json(value) for name, value in pairs.items() if value is not None}


def from_json(kind: Any, content: Any) -> Any:
    """Return the value of a dataclass, or of a field's type; inverse of `to_json`. Unknown keys are ignored.

    Raises:
      TypeError: content of another type, or fields that are missing.
    """
    origin, arguments, make = get_origin(kind) or kind, get_args(kind), kind
    if origin is types.UnionType:  # with None, which JSON omits
        return from_json(arguments[0], content)
    expected = {float: int | float, tuple: list, Mapping: dict}.get(origin, dict if dataclasses.is_dataclass(origin) else origin)
    if not isinstance(content, expected):
        raise TypeError(f"expected {expected}, not {content!r}")
    if dataclasses.is_dataclass(kind):
        fields = {name: field for name, field in get_type_hints(kind).items() if name in content}
        return make(**{name: from_json(field, content[name]) for name, field in fields.items()})
    if origin is Mapping:
        return {key: from_json(arguments[1], value) for key, value in content.items()}
    if origin is tuple:
        kinds = arguments[:1] * len(content) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(content):
            raise TypeError(f"expected {len(kinds)} entries, not {content!r}")
        return tuple(map(from_json, kinds, content))
    return content


def read_results(path: str | os.PathLike) -> Results:
    """Read the results.json of a run.

    Raises:
      UserError: the file is missing, or is something else.
    """
    try:
        content = files.read_json(files.any_path(path))
    except UserError as error:
        raise UserError(f"{error}; train.py and eval.py write such files") from error
    try:
        return from_json(Results, content)
    except TypeError as error:
        raise UserError(f"{path} is not a results.json of this version; write it again with train.py or eval.py") from error
