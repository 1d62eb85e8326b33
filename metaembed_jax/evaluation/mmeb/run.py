"""Evaluates a model on the tasks of MMEB that a folder has: every budget from one encoding, a finished task never again.

OUT/mmeb/{task}.json                  what `evaluate_task` found, and of which model and data
OUT/mmeb/embeddings/{task}-*.npz      vectors at the largest budget, until the task is finished
OUT/mmeb.json, mmeb.txt, mmeb.html    all tasks and their averages; the page also has a plot and the worst queries
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from metaembed_jax import hosts
from metaembed_jax.data.sources.files import ImageFolder
from metaembed_jax.evaluation.benchmark import write_benchmark
from metaembed_jax.evaluation.budgets import budget_name, by_cost
from metaembed_jax.evaluation.mmeb.reading import Questions, available, read_task
from metaembed_jax.evaluation.mmeb.report import averages, picture, table
from metaembed_jax.evaluation.mmeb.tasks import TASKS, Task
from metaembed_jax.evaluation.records import found_once, key_of
from metaembed_jax.evaluation.scoring import score_parts
from metaembed_jax.evaluation.tables import as_text
from metaembed_jax.evaluation.worst import Example, Miss, Ranking, example, worst_of, worst_queries
from metaembed_jax.files import replacing
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.model import MetaEmbed, from_parts

LAYOUT = 2  # of a task's file; one of an older layout does not count


def evaluate(
    model: MetaEmbed,
    identity: str,
    directory: Path,
    budgets: Sequence[Budget],
    out: Path,
    progress: bool,
    about: dict[str, str],
) -> str:
    """Evaluates every task there is, writes the files above, and returns the table.

    Args:
      identity: of the model: what was found for another one does not count.
      about: where the numbers are from, as `page.write_page` takes it.

    Raises:
      UserError: files that are missing or make no sense.
    """
    found, asked = {}, {}
    for task in available(directory, TASKS):
        questions = read_task(task, directory)
        key = key_of(LAYOUT, identity, questions.fingerprint, sorted(budgets))

        def find(task=task, questions=questions, key=key) -> dict:
            if progress:
                print(f"{task.name}: {len(questions.queries):,} queries, {len(questions.candidates):,} candidates", flush=True)
            return evaluate_task(model, questions, budgets, out / "mmeb" / "embeddings" / f"{task.name}-{key}", progress)

        found[task] = found_once(out / "mmeb" / f"{task.name}.json", key, find)
        asked[task] = questions._replace(choices=[])  # most of what a task takes in memory
    if hosts.is_first():
        _write_all(found, asked, budgets, out, about)
    return as_text(table(found, budgets))


def evaluate_task(model: MetaEmbed, questions: Questions, budgets: Sequence[Budget], cache: Path, progress: bool) -> dict:
    """{"queries", "candidates", "chance", "dimension", "precision": {"r_q:r_c": share of queries whose first choice is right},
    "worst": the worst queries at the dearest budget, each a `worst.Miss` as a dict}.

    Args:
      cache: the beginning of the files that hold the vectors until the task is finished.
    """
    most = tuple(max(budget[side] for budget in budgets) for side in (0, 1))
    queries, candidates = pictured(questions)
    query_rows, query_part = _encoded(model, queries, "query", most[0], cache, progress)
    rows, candidate_NRD = _encoded(model, candidates, "candidate", most[1], cache, progress)
    query_QRD = from_parts(query_rows, query_part, len(queries))
    precision = {}
    for budget in by_cost(budgets):
        scores_QN = score_parts(query_QRD, rows, candidate_NRD, len(candidates), budget)
        precision[budget_name(budget)] = float(first_choices(scores_QN, questions.choices).mean())
    worst = worst_queries(map(_ranking, scores_QN, questions.choices))  # the last, dearest budget's
    for file in cache.parent.glob(f"{cache.name}-*") if hosts.is_first() else ():
        file.unlink()
    return {
        "queries": len(queries),
        "candidates": len(candidates),
        "chance": float(np.mean([1 / len(choices) for choices in questions.choices])),
        "dimension": query_QRD.shape[2],
        "precision": precision,
        "worst": [miss._asdict() for miss in worst],
    }


def _ranking(scores_N: Float[np.ndarray, " N"], chosen: Sequence[int]) -> Ranking:
    return Ranking(np.array(chosen), scores_N[chosen], np.arange(len(chosen)) == 0)


def _write_all(found: dict[Task, dict], asked: dict[Task, Questions], budgets: Sequence[Budget], out: Path, about: dict) -> None:
    tasks = {task.name: {name: done[name] for name in done.keys() - {"key", "worst"}} for task, done in found.items()}
    figures = {"tasks": tasks, "averages": averages(found, budgets)}
    tables, plot, worst = [table(found, budgets)], picture(found, budgets), _worst(found, asked)
    about = about | {"data": f"MMEB, {key_of([(task.name, asked[task].fingerprint) for task in asked])}"}
    write_benchmark(out, "mmeb", f"{about['config']}: MMEB", figures, tables, plot, worst, about)


def _worst(found: dict[Task, dict], asked: dict[Task, Questions]) -> list[Example]:
    """The worst queries of all tasks. Images are read of these alone."""
    misses = ((Miss(**miss), task) for task, done in found.items() for miss in done["worst"])
    return [example(miss, *pictured(asked[task]), task.name) for miss, task in worst_of(misses)]


def first_choices(scores_QN: Float[np.ndarray, "Q N"], choices: Sequence[Sequence[int]]) -> np.ndarray:
    """bool [Q]: whether a query's right candidate, the first of its choices, scores above all others of them. A tie is a miss.

    A query that has no other choice is right.
    """
    return np.array([(row[chosen[0]] > row[chosen[1:]]).all() for row, chosen in zip(scores_QN, choices, strict=True)])


class Pictured(Sequence):
    """Items whose images are read when they are asked for."""

    def __init__(self, items: list[dict], images: ImageFolder):
        self.items, self.images = items, images

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> dict:
        one = self.items[number]
        return one | {"image": self.images.read(one["image"])} if "image" in one else one


def pictured(questions: Questions) -> tuple[Pictured, Pictured]:
    """Queries and candidates."""
    return Pictured(questions.queries, questions.images), Pictured(questions.candidates, questions.images)


def _encoded(model: MetaEmbed, items: Pictured, side: str, budget: int, cache: Path, progress: bool):
    """This host's rows and their vectors, from the cache if they are there."""
    path = cache.with_name(f"{cache.name}-{side}-{jax.process_index()}-of-{jax.process_count()}.npz")
    if path.is_file():
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return stored["rows"], stored["vectors"]
    rows, vectors = model.encode_part(items, side, budget=budget, progress=progress)
    with replacing(path) as file:
        np.savez(file, rows=rows, vectors=vectors)
    return rows, vectors
