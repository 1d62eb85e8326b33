"""Evaluates a model on the tasks of MMEB that a folder has: every budget from one encoding, a finished task never again.

OUT/mmeb/{task}.json                  what `evaluate_task` found, and of which model and data
OUT/mmeb/embeddings/{task}-*.npz      vectors at the largest budget, until the task is finished
OUT/mmeb.json, mmeb.txt, mmeb.html    all tasks and their averages; the page also has a plot and the worst queries
"""

import hashlib
import heapq
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from metaembed_jax import hosts
from metaembed_jax.data.sources.files import ImageFolder
from metaembed_jax.evaluation.mmeb.reading import Questions, available, read_task
from metaembed_jax.evaluation.mmeb.report import averages, picture, table
from metaembed_jax.evaluation.mmeb.tasks import TASKS, Task
from metaembed_jax.evaluation.page import write_page
from metaembed_jax.evaluation.report import write_file
from metaembed_jax.evaluation.sweep import Budget, budget_name, by_cost
from metaembed_jax.evaluation.tables import as_text
from metaembed_jax.evaluation.worst import WORST, Example, Miss, Ranking, example, worst_queries
from metaembed_jax.late_interaction.maxsim import maxsim_on
from metaembed_jax.model import MetaEmbed, from_parts
from metaembed_jax.sharding import make_mesh

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
        key = hashlib.sha256(repr((LAYOUT, identity, questions.fingerprint, sorted(budgets))).encode()).hexdigest()[:16]
        path = out / "mmeb" / f"{task.name}.json"
        done = json.loads(path.read_text()) if path.is_file() else {}
        if done.get("key") != key:
            if progress:
                print(f"{task.name}: {len(questions.queries):,} queries, {len(questions.candidates):,} candidates", flush=True)
            done = {
                "key": key,
                **evaluate_task(model, questions, budgets, out / "mmeb" / "embeddings" / f"{task.name}-{key}", progress),
            }
            _write(path, done)
        found[task], asked[task] = done, questions._replace(choices=[])  # most of what a task takes in memory
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
    query_QRD, here = from_parts(query_rows, query_part, len(queries)), make_mesh(devices=jax.local_devices())
    precision = {}
    for budget in by_cost(budgets):
        scores_QN = from_parts(rows, maxsim_on(here, query_QRD, candidate_NRD, budget).T, len(candidates)).T
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
    _write(out / "mmeb.json", {"tasks": tasks, "averages": averages(found, budgets)})
    results, examples = table(found, budgets), _worst(found, asked)
    write_file(out / "mmeb.txt", (as_text(results) + "\n").encode())
    fingerprint = hashlib.sha256(repr([(task.name, asked[task].fingerprint) for task in asked]).encode()).hexdigest()[:16]
    about = about | {"data": f"MMEB, {fingerprint}"}
    write_page(out / "mmeb.html", f"{about['config']}: MMEB", [results], picture(found, budgets), examples, about)


def _worst(found: dict[Task, dict], asked: dict[Task, Questions]) -> list[Example]:
    """The worst queries of all tasks. Images are read of these alone."""
    misses = ((Miss(**miss), task) for task, done in found.items() for miss in done["worst"])
    worst = heapq.nlargest(WORST, misses, key=lambda pair: pair[0].severity)
    return [example(miss, *pictured(asked[task]), task.name) for miss, task in worst]


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
        with np.load(path, allow_pickle=False) as stored:
            return stored["rows"], stored["vectors"]
    rows, vectors = model.encode_part(items, side, budget=budget, progress=progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, rows=rows, vectors=vectors)
    part.replace(path)
    return rows, vectors


def _write(path: Path, content: dict) -> None:
    if hosts.is_first():
        write_file(path, (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())
