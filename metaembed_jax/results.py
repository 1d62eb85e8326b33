"""Results of an evaluation, as dataclasses and as JSON: tasks, their searches, and the metrics of each search.

The JSON has all fields that are not None, and the means of each board.
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

ROUNDING = 1e-9  # of a mean of fractions


@dataclass(frozen=True)
class Interval:
    """A mean, as a fraction of 1, and the ends of its 95 % bootstrap interval (None: not computed)."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class SearchResults:
    """Metrics of a task at one budget, or of a search in stages.

    Attributes:
      budget: as in flags, "4:8" or "1:1:1000>16:64".
      flops_per_document, bytes_per_document: cost of MaxSim and size of the index; None for a search in stages.
      metrics: values by name.
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
    """A query that ranks a wrong document before all right ones.

    Attributes:
      dataset: the source or task, and its split and subset, in which items are numbered.
      query: the number of the query.
      rank: of its first right document, from 0; after all wrong ones of equal score, as in `metrics.gold_of`.
      among: the number of searched documents.
      right: (document, score) of the best right documents, best first.
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
        """Sort key of failures, the worst last: the rank, then the difference between the first wrong and the best right score."""
        return severity(self.rank, self.right[0][1], self.above[0][1])


def severity(rank: int, right: float, first: float) -> tuple[int, float]:
    """Return `Failure.severity`, given the rank, the best right score and the first wrong score."""
    return rank, 0.0 if first == right else first - right  # equal infinities have no difference


@dataclass(frozen=True, kw_only=True)
class TaskResults:
    """Results of one search task.

    Attributes:
      name: name of the task.
      metric: the main one, a key of each search's metrics.
      queries, documents: their numbers.
      dimension: width of a vector.
      data: version of the searched data.
      searches: cheapest first; searches in stages last.
      gain: None for a single budget, or if metrics have no intervals.
      chance: the main metric of random guesses, if known.
      failures: the worst ones at the largest budget.
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
    """Tasks in one table, and their means.

    Attributes:
      name: name of the benchmark, or of the direction of the search.
      measure: the main metric of the tasks.
      secondary: another metric of all tasks, for the plot; empty for none.
      legend: explains the numbers.
      tasks: all have the same searches; empty if all data of the board is private.
      total: the number of tasks, with those that are left out.
      groups: names of the tasks of further means, by group.
      drawn: groups in the plot, in addition to all tasks.
      published: means of all tasks that others report, by budget.
      notes: lines below the table.
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
        """Return the mean of a metric over tasks at each budget, by default of the main metrics; of a single task, its interval."""
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
      title: title of the evaluated data.
      model: name of its config.
      step: step of its checkpoint.
      data: version of all searched data.
      boards: at least one.
    """

    title: str
    model: str
    step: int
    data: str
    boards: tuple[Board, ...]

    def tasks(self) -> list[TaskResults]:
        """Return the tasks of all boards."""
        return [task for board in self.boards for task in board.tasks]


def to_json(results: Any) -> Any:
    """Convert a dataclass of this module to JSON's types."""
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
    """Convert JSON's types to a dataclass, or to the type of a field; inverse of `to_json`. Unknown keys are ignored.

    Raises:
      TypeError: content of another type, or missing fields.
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


def misfit(results: Results) -> str:
    """Return what is wrong in results that were read from JSON: parts that do not fit each other, or numbers that no metric has."""
    if not results.boards:
        return "boards is empty"
    for board in results.boards:
        names = [task.name for task in board.tasks]
        for group in board.drawn if names else ():
            if not set(board.groups.get(group, ())) & set(names):
                return f"board {board.name!r}: drawn has {group!r}; expected a group with tasks of the board"
        for task in board.tasks:
            if wrong := _misfit_of_task(task, board):
                return f"board {board.name!r}, task {task.name!r}: {wrong}"
    return ""


def _misfit_of_task(task: TaskResults, board: Board) -> str:
    budgets = [search.budget for search in task.searches]
    if not budgets or budgets != [search.budget for search in board.tasks[0].searches]:
        return "its searches are not those of the board's first task"
    for search in task.searches:
        for metric in filter(None, (task.metric, board.secondary)):
            if metric not in search.metrics:
                return f"budget {search.budget}: metrics lacks {metric!r}"
        for name, interval in search.metrics.items():
            numbers = [number for number in dataclasses.astuple(interval) if number is not None]
            if not all(-ROUNDING <= number <= 1 + ROUNDING for number in numbers):
                return f"budget {search.budget}: {name} is {numbers}; expected numbers from 0 to 1"
        for cost in (search.flops_per_document, search.bytes_per_document):
            if cost is not None and cost <= 0:
                return f"budget {search.budget}: a cost is {cost}; expected a positive integer"
    return ""


def read_results(path: str | os.PathLike) -> Results:
    """Read the results.json of a run.

    Raises:
      UserError: the file is missing, or is not results of this version, or was damaged; names what does not fit.
    """
    try:
        content = files.read_json(files.any_path(path))
    except UserError as error:
        raise UserError(f"{error}; train.py and eval.py write such files") from error
    try:
        results = from_json(Results, content)
    except TypeError as error:
        raise UserError(f"{path} is not a results.json of this version; write it again with train.py or eval.py") from error
    if wrong := misfit(results):
        raise UserError(f"{path}: {wrong}; write it again with train.py or eval.py")
    return results
