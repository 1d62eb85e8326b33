"""Evaluates a model on the validation or test split of a source: the same call in training and in `eval.py`."""

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from metaembed_jax.data import sources
from metaembed_jax.evaluation.report import format_table, plot, write_results
from metaembed_jax.evaluation.sweep import Budget, sweep
from metaembed_jax.model import MetaEmbed

DIRECTIONS = ("text→image", "image→text")


def evaluate(model: MetaEmbed, config: ConfigDict, split: str, budgets: Sequence[Budget], progress: bool) -> dict:
    """Encodes a split once, at the largest of the budgets, and scores every budget in both directions.

    The source is the first of `config.data.sources`. Image→text reads the same scores the other way round: for each image, the
    texts are ranked.

    Returns:
      The results of `sweep.sweep`.
    """
    task = sources.retrieval(config.data.sources[0][0], config.data.dir, split)
    query_budget, candidate_budget = (max(budget[side] for budget in budgets) for side in (0, 1))
    query_QRD = model.encode_query(task.queries, budget=query_budget, progress=progress)
    candidate_NRD = model.encode_document(task.candidates, budget=candidate_budget, progress=progress)
    return sweep(query_QRD, candidate_NRD, task.relevance, budgets, DIRECTIONS)


def quality(results: dict) -> float:
    """What the best checkpoint is best at: R@10 of text→image at the largest budget, of 1."""
    return results["directions"][0]["rows"][-1]["metrics"]["R@10"]["mean"]


def report(results: dict, config: ConfigDict, out: Path, step: int) -> str:
    """Writes results.json and quality.png to `out`, and returns the table."""
    name = config.data.sources[0][0]
    fingerprint = sources.prepare(name, config.data.dir)["fingerprint"]
    versions = {package: importlib.metadata.version(package) for package in ("jax", "flax", "optax", "numpy")}
    write_results(out / "results.json", {"step": step, **results}, json.loads(config.to_json()), fingerprint, versions)
    plot(out / "quality.png", [(config.name, results)])
    return format_table(results)
