"""What people see of mteb's benchmarks: a table of each with its tasks and their mean, and the means against cost."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from metaembed_jax.evaluation.budgets import search_name
from metaembed_jax.evaluation.drawing import Curve, Row, draw, point
from metaembed_jax.evaluation.mteb.tasks import Benchmark
from metaembed_jax.evaluation.tables import Table
from metaembed_jax.late_interaction.stages import Stages


class Found(NamedTuple):
    """What was found on a benchmark.

    Attributes:
      benchmark: which one.
      tasks: of each task what `run.evaluate_task` found.
      private: of each task that was left out, which and why.
    """

    benchmark: Benchmark
    tasks: dict
    private: list[str]


def means(found: Found, searches: Sequence[Stages]) -> dict[str, float]:
    """{search: mean main score of the tasks}; empty if there is none."""
    names = map(search_name, searches) if found.tasks else ()
    return {name: float(np.mean([done["searches"][name]["main_score"] for done in found.tasks.values()])) for name in names}


def table(found: Found, searches: Sequence[Stages]) -> Table:
    """Tasks and their mean, the main score of each in percent at every budget."""
    names, total = list(map(search_name, searches)), len(found.benchmark.tasks) + len(found.benchmark.others)

    def row(label: str, values: dict[str, float]) -> list[str]:
        return [label, *(f"{100 * values[name]:.1f}" for name in names)]

    tasks = [
        row(f"{done['task']}, {done['main_score']}", {name: figures["main_score"] for name, figures in done["searches"].items()})
        for done in found.tasks.values()
    ]
    bodies = [tasks, [row(f"mean of {len(tasks)} of {total} tasks", means(found, searches))]] if tasks else [[]]
    about = "The main score of each task, as mteb defines and names it. A column is a budget, query vectors : candidate vectors."
    if any(len(stages) > 1 for stages in searches):
        about += " In stages, r_q:r_c:n>r_q:r_c, the best n are ranked again; these searches are not in the plot."
    others = ", ".join(found.benchmark.others)
    notes = [f"not retrieval of texts and images: {others}"] if others else []
    notes += [f"left out: {task}" for task in found.private]
    return Table(f"{found.benchmark.name}, main score (%)", about, ["task", *names], bodies, notes)


def picture(found: Sequence[Found], searches: Sequence[Stages], dimension: int) -> bytes | None:
    """A PNG of the mean of each benchmark at plain budgets, over FLOPs and bytes per candidate; None if there is no such budget."""
    plain = [stages for stages in searches if len(stages) == 1]
    curves = [
        Curve(one.benchmark.name, [point(stages[0], dimension, means(one, plain)[search_name(stages)]) for stages in plain], colour)
        for colour, one in enumerate(found)
        if one.tasks
    ]
    return draw([Row("mteb", "mean main score (%)", curves)]) if plain else None
