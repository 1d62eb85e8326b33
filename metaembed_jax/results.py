"""Results of an evaluation: tasks, the searches of each, the metrics of each search; as dataclasses, and as JSON in a file.

JSON has the fields of the dataclasses, but those that are None, and beside them what a reader may want: the means of a board.
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
    """A mean, as a fraction of 1, and the ends of its 95 % bootstrap interval, None where there is none."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class SearchResults:
    """Metrics of a task that was searched at one budget, or in stages.

    Attributes:
      budget: as people write it, "4:8" or "1:1:1000>16:64".
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
      dataset: where its numbers count: a source, or a task with what divides it.
      query: its number.
      rank: of its first right document; 0 would be no failure. Behind all others of equal score, as in `metrics.gold_of`.
      among: how many documents it chose among.
      right: (document, score) of some right ones, best first.
      above: the same of wrong ones that rank before them.
    """

    dataset: tuple[str, ...] = ()
    query: int
    rank: int
    among: int
    right: tuple[tuple[int, float], ...]
    above: tuple[tuple[int, float], ...]

    @property
    def severity(self) -> tuple[int, float]:
        """Order of failures, the largest being the worst: the rank, then how much better the first document scores."""
        return severity(self.rank, self.right[0][1], self.above[0][1])


def severity(rank: int, right: float, first: float) -> tuple[int, float]:
    """`Failure.severity` of a rank, the best right and the first wrong score."""
    return rank, 0.0 if first == right else first - right  # equal infinities have no difference


@dataclass(frozen=True, kw_only=True)
class TaskResults:
    """Results of one search task.

    Attributes:
      name: of the task.
      metric: the main one, a key of each search's metrics.
      queries, documents: how many.
      dimension: width of a vector.
      data: version of what was searched.
      searches: cheapest first, then those in stages.
      gain: None of a single budget, or where metrics have no intervals.
      chance: what guessing would reach in the main metric, where that is known.
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
        """A metric at each budget, by default the main one."""
        return {search.budget: search.metrics[metric or self.metric] for search in self.searches}

    def is_like_chance(self) -> bool:
        """Whether the best search is within two standard deviations of guessing."""
        if self.chance is None or self.chance >= 1:
            return False
        best = max(interval.mean for interval in self.values().values())
        return best <= self.chance + 2 * (self.chance * (1 - self.chance) / self.queries) ** 0.5


@dataclass(frozen=True, kw_only=True)
class Board:
    """Tasks that are shown together, and their means.

    Attributes:
      name: of the benchmark, or of the direction that sources are searched in.
      measure: the tasks' main metric.
      secondary: another metric of all tasks, for the plot; empty for none.
      about: how to read the numbers.
      tasks: all are searched alike; none if all data of the board is private.
      total: tasks that the board has, with those that are left out.
      groups: the tasks of further means, by name.
      drawn: those groups that the plot shows beside all tasks.
      published: what others report as the mean of all tasks, by budget.
      notes: lines for the reader.
    """

    name: str
    measure: str
    secondary: str = ""
    about: str
    tasks: tuple[TaskResults, ...]
    total: int
    groups: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    drawn: tuple[str, ...] = ()
    published: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def mean(self, metric: str = "", group: str = "") -> dict[str, Interval]:
        """The mean over tasks of a metric at each budget, by default of each task's main one; a single task's own interval."""
        tasks = [task.values(metric) for task in self.tasks if not group or task.name in self.groups[group]]
        if len(tasks) == 1:
            return tasks[0]
        budgets = tasks[0] if tasks else {}
        return {budget: Interval(float(np.mean([task[budget].mean for task in tasks]))) for budget in budgets}

    def means(self) -> dict[str, dict[str, Interval]]:
        """The mean of each group, and last of all tasks."""
        return {group: self.mean(group=group) for group in self.groups} | {"all": self.mean()}


@dataclass(frozen=True, kw_only=True)
class Results:
    """Results of one evaluation of one model.

    Attributes:
      title: what the model was evaluated on.
      model: name of its config.
      step: of its checkpoint.
      data: version of all that was searched.
      boards: at least one; the first one's mean says how good the model is.
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
    """A dataclass of this module as JSON's types."""
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
    """Inverse of `to_json` for a dataclass, or another type that its fields have; keys that are no fields do not matter.

    Raises:
      TypeError: content of another type, or fields that are missing.
    """
    origin: Any = get_origin(kind) or kind
    arguments = get_args(kind)
    if origin is types.UnionType:  # with None, which is not written
        return from_json(arguments[0], content)
    expected = {float: int | float, tuple: list, Mapping: dict}.get(origin, dict if dataclasses.is_dataclass(origin) else origin)
    if not isinstance(content, expected):
        raise TypeError(f"expected {expected}, not {content!r}")
    if dataclasses.is_dataclass(kind):
        fields = {name: field for name, field in get_type_hints(kind).items() if name in content}
        return origin(**{name: from_json(field, content[name]) for name, field in fields.items()})
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
      UserError: the file is missing or is something else; names it.
    """
    try:
        content = files.read_json(files.any_path(path))
    except UserError as error:
        raise UserError(f"{error}; train.py and eval.py write such files") from error
    try:
        return from_json(Results, content)
    except TypeError as error:
        raise UserError(f"{path} is not a results.json that this version of train.py or eval.py writes") from error
