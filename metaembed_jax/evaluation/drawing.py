"""Curves of quality against cost, as a PNG: over FLOPs on the left, over index bytes on the right."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from metaembed_jax.evaluation.budgets import budget_name
from metaembed_jax.evaluation.cost import index_bytes, maxsim_flops
from metaembed_jax.late_interaction.groups import Budget

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe & Ito: told apart by colour-blind readers


class Point(NamedTuple):
    """A budget, what it costs for each candidate, and how good it is.

    Attributes:
      name: written over the point.
      flops: of MaxSim.
      bytes: of the index.
      mean, low, high: quality as a fraction of 1, and the ends of its bar; equal where there is none.
    """

    name: str
    flops: int
    bytes: int
    mean: float
    low: float
    high: float


def point(budget: Budget, dimension: int, quality: float) -> Point:
    """The point of a budget, without a bar. dimension: width of a vector."""
    cost = maxsim_flops(budget, dimension), index_bytes(budget[1], dimension)
    return Point(budget_name(budget), *cost, quality, quality, quality)


class Curve(NamedTuple):
    """One line: `colour` counts through `COLOURS`, a secondary one is dashed and hollow."""

    label: str
    points: Sequence[Point]
    colour: int
    secondary: bool = False


class Row(NamedTuple):
    """Two panels side by side with the same curves; `quality` names their vertical axis."""

    title: str
    quality: str
    curves: Sequence[Curve]


def draw(rows: Sequence[Row]) -> bytes:
    """A PNG of all rows; the same bytes for the same rows. The first row has the legend of all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # Figure objects only: pyplot keeps global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.9 + 3.7 * len(rows)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), 2, squeeze=False, sharey="row", sharex="col")
    for row, pair in zip(rows, panels, strict=True):
        for panel, cost, unit in zip(pair, ("flops", "bytes"), ("", "B"), strict=True):
            _draw_panel(panel, row.curves, cost)
            _style_panel(panel, unit)
        pair[0].set_title(row.title, loc="left", fontweight="bold")
        pair[0].set_ylabel(row.quality)
    panels[-1][0].set_xlabel("MaxSim FLOPs per candidate")
    panels[-1][1].set_xlabel("index bytes per candidate (bf16)")
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 6), frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def _draw_panel(panel, curves: Sequence[Curve], cost: str) -> None:
    """The curves over one cost; a budget is written once, over the highest point of it."""
    highest = {}
    for curve in curves:
        points = sorted(curve.points, key=lambda point: getattr(point, cost))
        x = [getattr(point, cost) for point in points]
        mean, low, high = (100 * np.array([getattr(point, key) for point in points]) for key in ("mean", "low", "high"))
        colour = COLOURS[curve.colour % len(COLOURS)]
        panel.errorbar(
            x,
            mean,
            yerr=np.maximum([mean - low, high - mean], 0),  # rounding must not make a bar negative
            color=colour,
            linestyle="--" if curve.secondary else "-",
            linewidth=1.8,
            marker="o",
            markersize=6,
            markerfacecolor="white" if curve.secondary else colour,
            capsize=3,
            elinewidth=1,
            label=curve.label,
        )
        for spot, point, top in zip(x, points, high, strict=True):
            highest[spot, point.name] = max(highest.get((spot, point.name), 0), top)
    for (spot, name), top in highest.items():
        panel.annotate(name, (spot, top), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=8, color="#444444")


def _style_panel(panel, unit: str) -> None:
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
