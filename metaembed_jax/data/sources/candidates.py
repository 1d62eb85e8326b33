"""Scores and labels of a query's candidates: its positive, then its K hard negatives; C = 1 + K of B pairs.

    teacher_scores    by any reranker, on any scale; NaN where it gave none
    labels            weights of right answers: a negative with a label above 0 is a further positive

A record without scores lacks "teacher_scores". One without further positives lacks "labels", which are then 1, 0, ..., 0.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from metaembed_jax.errors import UserError, shortened

NUMBERS = ("teacher_scores", "labels")
LARGEST = 2.0**100  # a float32 holds it, and sums of some


def read_numbers(scores: object, labels: object, count: int, columns: tuple[str, str] = NUMBERS) -> dict[str, list[float]]:
    """Return "teacher_scores" and "labels" of a record from the values of a row.

    Args:
      scores: a list of a number for each candidate, null where the teacher gave none; null or empty for none at all.
      labels: a list of a number of 0 or more for each candidate, above 0 for the positive; null or empty for the usual ones.
      count: number of candidates.
      columns: names of both, for errors.

    Raises:
      UserError: a list has another length, or a value is not such a number.
    """
    numbers = {"teacher_scores": _teacher_scores(scores, count, columns[0]), "labels": _labels(labels, count, columns[1])}
    return {name: values for name, values in numbers.items() if values}


def _teacher_scores(values: object, count: int, column: str) -> list[float]:
    scores = [math.nan if value is None else _number(value, column) for value in _list(values, count, column)]
    return [] if all(map(math.isnan, scores)) else scores


def _labels(values: object, count: int, column: str) -> list[float]:
    weights = [_number(value, column) for value in _list(values, count, column)]
    if wrong := [weight for weight in weights if weight < 0]:
        raise UserError(f"{column}: {wrong[0]:g} is negative; expected 0 for a negative, or the weight of a right answer")
    if weights and not weights[0]:
        raise UserError(f"{column}: the first is 0, which is that of the positive; expected its weight, above 0")
    return weights if any(weights[1:]) else []


def further_positives(record: dict) -> list[dict]:
    """Return the negatives of a record that are right answers too."""
    weights = record.get("labels", ())
    return [item for item, weight in zip(record.get("negatives", ()), weights[1:], strict=False) if weight > 0]


def as_arrays(records: Sequence[dict], negatives: int) -> dict[str, Float[np.ndarray, "B C"]]:
    """Return `NUMBERS` of records, or of their descriptions, float32, for the positive and the first `negatives` negatives.

    A missing score is NaN; missing labels are 1 for the positive, and 0 for all others.
    """
    shape = len(records), 1 + negatives
    scores_BC, labels_BC = np.full(shape, np.nan, np.float32), np.zeros(shape, np.float32)
    labels_BC[:, 0] = 1
    for row, record in enumerate(records):
        for array, name in zip((scores_BC, labels_BC), NUMBERS, strict=True):
            values = record.get(name, ())[: shape[1]]
            array[row, : len(values)] = values
    return dict(zip(NUMBERS, (scores_BC, labels_BC), strict=True))


def _list(values: object, count: int, column: str) -> list:
    if values is None or values == "":
        return []
    if not isinstance(values, list):
        raise UserError(f"{column}: expected a list of numbers, not {type(values).__name__}")
    if values and len(values) != count:
        raise UserError(f"{column}: {len(values)} numbers; expected {count}, one for the positive and for each negative")
    return values


def _number(value: object, column: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
        raise UserError(f"{column}: {shortened(value)} is not a finite number; expected one for each candidate")
    return float(value)
