"""Tables of results, for a terminal and for the HTML page."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from metaembed_jax.evaluation.metrics import METRICS
from metaembed_jax.results import Board, Interval, Results, TaskResults


class Table(NamedTuple):
    """A table of texts; the first column has the names of rows, the others have formatted numbers.

    Attributes:
      title: one line.
      legend: explains the numbers, on the page.
      head: names of the columns.
      bodies: groups of rows, each as long as `head`.
      notes: lines below the table.
    """

    title: str
    legend: str
    head: Sequence[str]
    bodies: Sequence[Sequence[Sequence[str]]]
    notes: Sequence[str] = ()


def tables(results: Results) -> list[Table]:
    """Return a table of each board: all metrics of a single task that has them, or the main metric of all tasks."""
    return [_metrics_table(board) if _is_detailed(board) else _tasks_table(board) for board in results.boards]


def format_tables(results: Results) -> str:
    """Return the tables as text."""
    return "\n\n".join(map(as_text, tables(results)))


def as_text(table: Table) -> str:
    """Return the title, the aligned rows with a blank line between groups, and the notes."""
    lines = [table.head, *(row for body in table.bodies for row in body)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def aligned(rows: Sequence[Sequence[str]]) -> str:
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        )

    first, *others = table.bodies
    return "\n".join([table.title, "\n\n".join([aligned([table.head, *first]), *map(aligned, others)]), *table.notes])


def _is_detailed(board: Board) -> bool:
    searches = [search for task in board.tasks for search in task.searches]
    return board.total == 1 and bool(searches) and all(search.metrics.keys() == METRICS.keys() for search in searches)


def _metrics_table(board: Board) -> Table:
    """Return the metrics of a board's only task at each budget, in percent, and the gain with its 95 % bootstrap interval."""
    (task,), rows = board.tasks, []
    for search in task.searches:
        costs = f"{search.flops_per_document:,}", f"{search.bytes_per_document:,}"
        rows.append([search.budget, *costs, *(f"{100 * search.metrics[name].mean:.1f}" for name in METRICS)])
    if task.gain:
        gains = [task.gain.metrics[name] for name in METRICS]
        rows.append(["gain", "", "", *(f"{100 * gain.mean:+.1f}" for gain in gains)])
        rows.append(["95 % interval", "", "", *map(_ends, gains)])
    sizes = f"{task.queries:,} queries, {task.documents:,} documents"
    head = ["budget", "FLOPs", "bytes", *METRICS]
    return Table(f"{board.name}: {sizes}, FLOPs and bytes per document", board.legend, head, [rows], board.notes)


def _ends(gain: Interval) -> str:
    return "" if gain.low is None or gain.high is None else f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f}"


def _tasks_table(board: Board) -> Table:
    """Return the main metric of tasks, means and published figures at every budget, in percent."""
    names = list(board.mean())

    def row(label: str, values: Mapping[str, float]) -> list[str]:
        return [label, *(f"{100 * values[name]:.1f}" if name in values else "" for name in names)]

    def means_of(intervals: Mapping[str, Interval]) -> dict[str, float]:
        return {name: interval.mean for name, interval in intervals.items()}

    tasks = [row(_label(board, task), means_of(task.values())) for task in board.tasks]
    means = [row(f"mean: {group}", means_of(board.mean(group=group))) for group in board.groups]
    means += [row(f"mean of {len(tasks)} of {board.total} tasks", means_of(board.mean()))] if tasks else []
    published = [row(f"published: {model}", values) for model, values in board.published.items()]
    queries = sum(task.queries for task in board.tasks)
    title = f"{board.name}, {board.measure} (%) of {queries:,} queries in {len(tasks)} tasks"
    cut = " x numbers of a vector" if any("x" in name for name in names) else ""
    legend = f"{board.legend} A column is a budget, query vectors : document vectors{cut}."
    if any(">" in name for name in names):
        legend += " In stages, r_q:r_c:n>r_q:r_c, the best n are ranked again; these searches are not in the plot."
    bodies = [tasks, *filter(None, (means, published))]
    return Table(title, legend, ["task", *names], bodies, board.notes)


def _label(board: Board, task: TaskResults) -> str:
    texts = [task.name, *([task.metric] if task.metric != board.measure else [])]
    return ", ".join([*texts, *(["no better than chance"] if task.is_like_chance() else [])])
