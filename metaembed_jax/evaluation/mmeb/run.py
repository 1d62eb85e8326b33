"""Evaluates a model on the tasks of MMEB that a folder has: every budget from one encoding, a finished task never again.

OUT/mmeb/{task}.json                  what `evaluate_task` found, and of which model and data
OUT/mmeb/embeddings/{task}-*.npz      vectors at the largest budget, until the task is finished
OUT/mmeb.json, OUT/mmeb.txt           all tasks and their averages
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from metaembed_jax import hosts
from metaembed_jax.data.sources.files import ImageFolder
from metaembed_jax.evaluation.budgets import budget_name
from metaembed_jax.evaluation.mmeb.reading import Questions, available, read_task
from metaembed_jax.evaluation.mmeb.tasks import TASKS, Task
from metaembed_jax.evaluation.records import found_once, write_json
from metaembed_jax.evaluation.report import write_file
from metaembed_jax.evaluation.scoring import score_parts
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.model import MetaEmbed, from_parts

# P@1 of all 36 tasks, from arXiv 2509.18095.
PUBLISHED = (
    ("MetaEmbed-3B", {(1, 1): 65.4, (16, 64): 69.1}),
    ("MetaEmbed-7B", {(1, 1): 71.3, (8, 16): 74.3, (16, 64): 76.6}),
    ("MetaEmbed-32B", {(1, 1): 72.4, (16, 64): 78.7}),
)


def evaluate(model: MetaEmbed, identity: str, directory: Path, budgets: Sequence[Budget], out: Path, progress: bool) -> str:
    """Evaluates every task there is, writes the files above, and returns the table.

    Args:
      identity: of the model: what was found for another one does not count.

    Raises:
      UserError: files that are missing or make no sense.
    """
    found = {}
    for task in available(directory, TASKS):
        questions = read_task(task, directory)
        key = hashlib.sha256(repr((identity, questions.fingerprint, sorted(budgets))).encode()).hexdigest()[:16]

        def find(task=task, questions=questions, key=key) -> dict:
            if progress:
                print(f"{task.name}: {len(questions.queries):,} queries, {len(questions.candidates):,} candidates", flush=True)
            return evaluate_task(model, questions, budgets, out / "mmeb" / "embeddings" / f"{task.name}-{key}", progress)

        found[task] = found_once(out / "mmeb" / f"{task.name}.json", key, find)
    table = format_table(found, budgets)
    tasks = {task.name: {name: value for name, value in done.items() if name != "key"} for task, done in found.items()}
    write_json(out / "mmeb.json", {"tasks": tasks, "averages": averages(found, budgets)})
    if hosts.is_first():
        write_file(out / "mmeb.txt", (table + "\n").encode())
    return table


def evaluate_task(model: MetaEmbed, questions: Questions, budgets: Sequence[Budget], cache: Path, progress: bool) -> dict:
    """{"queries", "candidates", "chance", "precision": {"r_q:r_c": share of queries whose first choice is right}}.

    Args:
      cache: the beginning of the files that hold the vectors until the task is finished.
    """
    most = tuple(max(budget[side] for budget in budgets) for side in (0, 1))
    queries, candidates = (Pictured(items, questions.images) for items in (questions.queries, questions.candidates))
    query_rows, query_part = _encoded(model, queries, "query", most[0], cache, progress)
    rows, candidate_NRD = _encoded(model, candidates, "candidate", most[1], cache, progress)
    query_QRD = from_parts(query_rows, query_part, len(queries))
    precision = {}
    for budget in budgets:
        scores_QN = score_parts(query_QRD, rows, candidate_NRD, len(candidates), budget)
        precision[budget_name(budget)] = float(first_choices(scores_QN, questions.choices).mean())
    for file in cache.parent.glob(f"{cache.name}-*") if hosts.is_first() else ():
        file.unlink()
    chance = float(np.mean([1 / len(choices) for choices in questions.choices]))
    return {"queries": len(queries), "candidates": len(candidates), "chance": chance, "precision": precision}


def first_choices(scores_QN: Float[np.ndarray, "Q N"], choices: Sequence[Sequence[int]]) -> np.ndarray:
    """bool [Q]: whether a query's right candidate, the first of its choices, scores above all others of them. A tie is a miss.

    A query that has no other choice is right.
    """
    return np.array([(row[chosen[0]] > row[chosen[1:]]).all() for row, chosen in zip(scores_QN, choices, strict=True)])


def averages(found: dict[Task, dict], budgets: Sequence[Budget]) -> dict[str, dict[str, float]]:
    """{name of an average: {budget: mean of its tasks}}, of those averages whose tasks are there."""
    kinds = {group: [task for task in found if task.group == group] for group in dict.fromkeys(task.group for task in found)}
    kinds |= {"in domain": [task for task in found if task.in_domain], "out of domain": [t for t in found if not t.in_domain]}
    kinds["all"] = list(found)
    means = {}
    for name, tasks in kinds.items():
        if tasks:
            means[name] = {
                budget_name(budget): float(np.mean([found[task]["precision"][budget_name(budget)] for task in tasks]))
                for budget in budgets
            }
    return means


def is_like_chance(done: dict) -> bool:
    """Whether the best budget is within two standard deviations of guessing."""
    chance = done["chance"]
    return max(done["precision"].values()) <= chance + 2 * (chance * (1 - chance) / done["queries"]) ** 0.5 and chance < 1


def format_table(found: dict[Task, dict], budgets: Sequence[Budget]) -> str:
    """Tasks, averages and the published rows, Precision@1 in percent at every budget."""
    names = [budget_name(budget) for budget in budgets]

    def line(name, values, mark=""):
        return f"{name:<28}" + "".join(f"{100 * values[key]:>9.1f}" if key in values else f"{'':>9}" for key in names) + mark

    lines = [f"{'MMEB, Precision@1 (%)':<28}" + "".join(f"{name:>9}" for name in names)]
    for task, done in found.items():
        lines.append(line(task.name, done["precision"], "  no better than chance" if is_like_chance(done) else ""))
    lines.append("")
    counts = {"all": len(found)}
    for name, values in averages(found, budgets).items():
        lines.append(line(f"mean: {name}" + (f" {counts[name]} of {len(TASKS)}" if name in counts else ""), values))
    lines.append("")
    for name, values in PUBLISHED:
        lines.append(line(f"published: {name}", {budget_name(budget): value / 100 for budget, value in values.items()}))
    return "\n".join(lines)


class Pictured(Sequence):
    """Items whose images are read when they are asked for."""

    def __init__(self, items: list[dict], images: ImageFolder):
        self.items, self.images = items, images

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> dict:
        one = self.items[number]
        return one | {"image": self.images.read(one["image"])} if "image" in one else one


def _encoded(model: MetaEmbed, items: Pictured, side: str, budget: int, cache: Path, progress: bool):
    """This host's rows and their vectors, from the cache if they are there."""
    path = cache.with_name(f"{cache.name}-{side}-{jax.process_index()}-of-{jax.process_count()}.npz")
    if path.is_file():
        with np.load(path, allow_pickle=False) as stored:
            return stored["rows"], stored["vectors"]
    rows, vectors = model.encode_part(items, side, budget=budget, progress=progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, rows=rows, vectors=vectors)
    part.replace(path)
    return rows, vectors
