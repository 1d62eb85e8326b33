"""Plots of quality against cost, as a PNG: over FLOPs on the left, over index bytes on the right."""

import dataclasses
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from metaembed_jax.results import Board, Interval, Results

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe & Ito, for colour-blind readers


class Point(NamedTuple):
    """The cost of a budget, and its quality.

    Attributes:
      name: the label over the point.
      flops: FLOPs of MaxSim for each document.
      bytes: bytes of the index for each document.
      mean, low, high: quality as a fraction of 1, and the ends of its bar; all equal if there is no bar.
    """

    name: str
    flops: int
    bytes: int
    mean: float
    low: float
    high: float


class Curve(NamedTuple):
    """A line of the plot: `colour` is an index of `COLOURS`; a secondary line is dashed, with hollow points."""

    label: str
    points: Sequence[Point]
    colour: int
    secondary: bool = False


class Panels(NamedTuple):
    """Two panels with the same curves, next to each other; `quality` is the label of the vertical axis."""

    title: str
    quality: str
    curves: Sequence[Curve]


def draw_results(results: Sequence[Results]) -> bytes | None:
    """Draw the means of some models on each board: a row of panels for each board, a colour for each model and group of tasks.

    Both directions are boards, because a budget costs other bytes backward. Bars are 95 % bootstrap intervals, if there are any.
    Points have their budgets as labels. With widths, a line is the Pareto front over its cost, and the other points are small.

    Returns:
      A PNG, the same bytes for the same results; None if all searches are in stages.
    """
    rows = []
    for number in range(max(len(model.boards) for model in results)):
        boards = [(model.model, model.boards[number]) for model in results if number < len(model.boards)]
        colours = itertools.count()
        curves = [curve for model, board in boards for curve in _curves(model, board, colours)]
        title = " · ".join(dict.fromkeys(board.name for _, board in boards))
        quality = dict.fromkeys(metric for _, board in boards for metric in (board.measure, board.secondary) if metric)
        if curves:
            rows.append(Panels(title, f"{', '.join(quality)} (%)", curves))
    return draw(rows) if rows else None


def _curves(model: str, board: Board, colours: Iterator[int]) -> list[Curve]:
    """Return the curves of a model on a board, without searches in stages: of all tasks, and of each group of `board.drawn`."""
    curves = []
    for group in ("", *board.drawn) if board.tasks else ():
        colour = next(colours)
        for metric in ("", board.secondary) if board.secondary else ("",):
            label = " ".join(filter(None, (model, group, metric or board.measure)))
            curve = Curve(label, _points(board, board.mean(metric, group)), colour, secondary=bool(metric))
            curves += [curve] if curve.points else []
    return curves


def _literal(text: str) -> str:
    """Return a text that matplotlib draws as it is: a dollar would begin a formula."""
    return text.replace("$", r"\$")


def _points(board: Board, means: Mapping[str, Interval]) -> list[Point]:
    points = []
    for search in board.tasks[0].searches:
        mean, low, high = dataclasses.astuple(means[search.budget])
        flops, size = search.flops_per_document, search.bytes_per_document
        if flops is not None and size is not None:
            points.append(Point(search.budget, flops, size, mean, mean if low is None else low, mean if high is None else high))
    return points


def draw(rows: Sequence[Panels]) -> bytes:
    """Draw rows of panels as a PNG. The legend is that of the first row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot, which has global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.9 + 3.7 * len(rows)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), 2, squeeze=False, sharey="row", sharex="col")
    for row, pair in zip(rows, panels, strict=True):
        for panel, cost, unit in zip(pair, ("flops", "bytes"), ("", "B"), strict=True):
            _draw_panel(panel, row.curves, cost)
            _style_panel(panel, unit)
        pair[0].set_title(_literal(row.title), loc="left", fontweight="bold")
        pair[0].set_ylabel(row.quality)
    panels[-1][0].set_xlabel("MaxSim FLOPs per document")
    panels[-1][1].set_xlabel("index bytes per document (bf16)")
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 6), frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def _draw_panel(panel: Any, curves: Sequence[Curve], cost: str) -> None:
    """Draw the curves over one cost; each budget on a line has one label, over its highest point."""
    highest: dict[tuple[int, str], float] = {}
    for curve in curves:
        line = connected(curve.points, cost)
        others = [point for point in curve.points if point not in line]
        colour, style = COLOURS[curve.colour % len(COLOURS)], "--" if curve.secondary else "-"
        _draw_points(panel, others, cost, colour, curve.secondary, linestyle="none", markersize=3)
        top = _draw_points(panel, line, cost, colour, curve.secondary, linestyle=style, markersize=6, label=_literal(curve.label))
        for point, height in zip(line, top, strict=True):
            position = getattr(point, cost)
            highest[position, point.name] = max(highest.get((position, point.name), 0), height)
    for (position, name), top in highest.items():
        panel.annotate(name, (position, top), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=8, color="#444444")


def connected(points: Sequence[Point], cost: str) -> list[Point]:
    """Return the points that a line connects, cheapest first.

    Without widths, a line connects all points; with them, the Pareto front: the points of a higher quality than all cheaper ones.
    """
    if not any("x" in point.name for point in points):
        return sorted(points, key=lambda point: getattr(point, cost))
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (getattr(point, cost), -point.mean)):
        if not front or point.mean > front[-1].mean:
            front.append(point)
    return front


def _draw_points(panel: Any, points: Sequence[Point], cost: str, colour: str, is_hollow: bool, **style: Any) -> np.ndarray:
    """Draw points and their bars, and return the tops of the bars."""
    mean, low, high = (100 * np.array([getattr(point, key) for point in points]) for key in ("mean", "low", "high"))
    panel.errorbar(
        [getattr(point, cost) for point in points],
        mean,
        yerr=np.maximum([mean - low, high - mean], 0),  # rounding must not make a bar negative
        color=colour,
        linewidth=1.8,
        marker="o",
        markerfacecolor="white" if is_hollow else colour,
        capsize=3,
        elinewidth=1,
        **style,
    )
    return high


def _style_panel(panel: Any, unit: str) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(base=4))  # budgets grow by powers of two, about a factor of four a step
    panel.xaxis.set_major_formatter(EngFormatter(unit=unit, places=0, sep=" " if unit else ""))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.margins(x=0.08, y=0.12)
    low, high = panel.dataLim.intervalx
    if low == high:  # one budget
        panel.set_xlim(low / 2, high * 2)
    panel.set_ylim(bottom=0)
    panel.grid(color="#dddddd", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
