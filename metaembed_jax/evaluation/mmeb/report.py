"""What people see of MMEB: the table of tasks and averages, with the published figures, and averages against cost."""

from collections.abc import Sequence

import numpy as np

from metaembed_jax.evaluation.budgets import budget_name, by_cost
from metaembed_jax.evaluation.drawing import Curve, Row, draw, point
from metaembed_jax.evaluation.mmeb.tasks import TASKS, Task
from metaembed_jax.evaluation.tables import Table
from metaembed_jax.late_interaction.groups import Budget

# P@1 of all 36 tasks, from arXiv 2509.18095.
PUBLISHED = (
    ("MetaEmbed-3B", {(1, 1): 65.4, (16, 64): 69.1}),
    ("MetaEmbed-7B", {(1, 1): 71.3, (8, 16): 74.3, (16, 64): 76.6}),
    ("MetaEmbed-32B", {(1, 1): 72.4, (16, 64): 78.7}),
)


def averages(found: dict[Task, dict], budgets: Sequence[Budget]) -> dict[str, dict[str, float]]:
    """{name of an average: {budget: mean of its tasks}}, of those averages whose tasks are there."""
    kinds = {group: [task for task in found if task.group == group] for group in dict.fromkeys(task.group for task in found)}
    kinds |= {"in domain": [task for task in found if task.in_domain], "out of domain": [t for t in found if not t.in_domain]}
    kinds["all"] = list(found)
    names = [budget_name(budget) for budget in budgets]
    return {
        kind: {name: float(np.mean([found[task]["precision"][name] for task in tasks])) for name in names}
        for kind, tasks in kinds.items()
        if tasks
    }


def is_like_chance(done: dict) -> bool:
    """Whether the best budget is within two standard deviations of guessing."""
    chance = done["chance"]
    return max(done["precision"].values()) <= chance + 2 * (chance * (1 - chance) / done["queries"]) ** 0.5 and chance < 1


def table(found: dict[Task, dict], budgets: Sequence[Budget]) -> Table:
    """Tasks, averages and the published rows, Precision@1 in percent at every budget."""
    names = [budget_name(budget) for budget in by_cost(budgets)]

    def row(label: str, values: dict[str, float]) -> list[str]:
        return [label, *(f"{100 * values[name]:.1f}" if name in values else "" for name in names)]

    def label(task: Task) -> str:
        return f"{task.name}, no better than chance" if is_like_chance(found[task]) else task.name

    def average(name: str) -> str:
        return f"mean: {name} {len(found)} of {len(TASKS)}" if name == "all" else f"mean: {name}"

    tasks = [row(label(task), done["precision"]) for task, done in found.items()]
    means = [row(average(name), values) for name, values in averages(found, budgets).items()]
    published = [
        row(f"published: {name}", {budget_name(budget): value / 100 for budget, value in values.items()})
        for name, values in PUBLISHED
    ]
    queries = sum(done["queries"] for done in found.values())
    return Table(
        f"MMEB, Precision@1 (%) of {queries:,} queries in {len(found)} tasks",
        "A query is answered if its right candidate scores above all others that it chooses among; means are over tasks. "
        "A column is a budget, query vectors : candidate vectors.",
        ["task", *names],
        [tasks, means, published],
    )


def picture(found: dict[Task, dict], budgets: Sequence[Budget]) -> bytes:
    """A PNG of the means of all tasks, those in the domain and those out of it, over FLOPs and bytes per candidate."""
    means, dimension = averages(found, budgets), next(iter(found.values()))["dimension"]
    curves = [
        Curve(name, [point(budget, dimension, means[name][budget_name(budget)]) for budget in budgets], colour)
        for colour, name in enumerate(("all", "in domain", "out of domain"))
        if name in means
    ]
    return draw([Row("MMEB", "mean Precision@1 (%)", curves)])
