"""Evaluates a model on the validation or test split of a source: the same call in training and in `eval.py`."""

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from metaembed_jax.data import sources
from metaembed_jax.evaluation.page import write_page
from metaembed_jax.evaluation.report import format_table, picture, tables, write_results
from metaembed_jax.evaluation.scoring import score_parts
from metaembed_jax.evaluation.sweep import sweep
from metaembed_jax.evaluation.worst import Miss, example
from metaembed_jax.files import write_bytes
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.model import MetaEmbed

DIRECTIONS = ("text→image", "image→text")


def evaluate(model: MetaEmbed, config: ConfigDict, split: str, budgets: Sequence[Budget], progress: bool) -> dict:
    """Encodes a split once, at the largest of the budgets, and scores every budget in both directions.

    Each host encodes its part of the candidates and scores all queries against it, on its devices; all of them return all results.

    The source is the first of `config.data.sources`. Image→text reads the same scores the other way round: for each image, the
    texts are ranked.

    Returns:
      The results of `sweep.sweep`.
    """
    task = sources.retrieval(config.data.sources[0][0], config.data.dir, split)
    query_budget, candidate_budget = (max(budget[side] for budget in budgets) for side in (0, 1))
    query_QRD = model.encode_query(task.queries, budget=query_budget, progress=progress)
    rows, candidate_NRD = model.encode_part(task.candidates, "candidate", budget=candidate_budget, progress=progress)

    def score(query_QRD, candidate_nRD, budget: Budget) -> Float[np.ndarray, "Q N"]:
        return score_parts(query_QRD, rows, candidate_nRD, len(task.candidates), budget)

    scoring = dict(score=score, candidates=len(task.candidates))
    return sweep(query_QRD, candidate_NRD, task.relevance, budgets, DIRECTIONS, **scoring)


def quality(results: dict) -> float:
    """What the best checkpoint is best at: R@10 of text→image at the largest budget, of 1."""
    return results["directions"][0]["rows"][-1]["metrics"]["R@10"]["mean"]


def report(results: dict, config: ConfigDict, out: Path, step: int) -> str:
    """Writes results.json, quality.png and report.html of the test split to `out`, and returns the table."""
    name = config.data.sources[0][0]
    fingerprint = sources.prepare(name, config.data.dir)["fingerprint"]
    write_results(out / "results.json", {"step": step, **results}, json.loads(config.to_json()), fingerprint, versions())
    plot = picture([(config.name, results)])
    write_bytes(out / "quality.png", plot)
    task = sources.retrieval(name, config.data.dir, "test")
    worst = [example(Miss(**miss), task.queries, task.candidates, name) for miss in results["worst"]]
    about = origin(config.name, step) | {"data": f"{name}, {fingerprint}"}
    write_page(out / "report.html", f"{config.name}: {name}, test split", tables(results), plot, worst, about)
    return format_table(results)


def versions() -> dict[str, str]:
    """Of the packages that numbers may depend on."""
    return {package: importlib.metadata.version(package) for package in ("jax", "flax", "optax", "numpy")}


def origin(config: str, step: int) -> dict[str, str]:
    """Which model numbers are of, as a page says it."""
    listed = ", ".join(f"{package} {version}" for package, version in versions().items())
    return {"config": config, "checkpoint": f"step {step}", "versions": listed}
