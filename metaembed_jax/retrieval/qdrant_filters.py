"""Filters of a search, translated to those of Qdrant.

Qdrant compares numbers as floats of 64 bits and has no order of texts, so filters that it would answer wrongly are refused. Two
things differ from `matching`: a list matches if one of its values does, and a key that no item has is not an error.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from metaembed_jax.errors import UserError, shortened
from metaembed_jax.retrieval.columns import Scalar
from metaembed_jax.retrieval.filters import Comparison, Filter, parse_filter

if TYPE_CHECKING:
    import qdrant_edge
    from qdrant_client import models

PLAIN_KEY = re.compile("[A-Za-z0-9_-]+")  # other keys are quoted
EXACT_BELOW = 2**53  # integers below it are exact as floats


def as_qdrant_filter(where: Mapping) -> "models.Filter":
    """Return a filter of Qdrant's client.

    Raises:
      UserError: the filter is wrong, or Qdrant cannot compare what it compares.
    """
    return _translate(parse_filter(where))


def as_edge_filter(condition: "models.Filter") -> "qdrant_edge.Filter":
    """Convert a filter from `as_qdrant_filter` for Qdrant's engine in this process."""
    import qdrant_edge
    from qdrant_client import models

    def convert(inner) -> "qdrant_edge.Filter | qdrant_edge.FieldCondition":
        if isinstance(inner, models.Filter):
            return as_edge_filter(inner)
        match, bounds = inner.match, inner.range
        if isinstance(match, models.MatchAny):
            match = qdrant_edge.MatchAny(match.any)
        elif match is not None:
            # The engine would take Python's True for the number 1.
            match = qdrant_edge.MatchValue(np.bool_(match.value))  # pyright: ignore[reportArgumentType]
        bounds = bounds and qdrant_edge.RangeFloat(bounds.gte, bounds.gt, bounds.lte, bounds.lt)
        return qdrant_edge.FieldCondition(inner.key, match, bounds, is_empty=inner.is_empty)

    groups = {name: getattr(condition, name) or () for name in ("must", "should", "must_not")}
    converted: dict[str, Any] = {name: [*map(convert, conditions)] for name, conditions in groups.items() if conditions}
    return qdrant_edge.Filter(**converted)


def _translate(condition: Filter) -> "models.Filter":
    from qdrant_client import models

    if isinstance(condition, Comparison):
        return _comparison(condition)
    name = {"$and": "must", "$or": "should", "$not": "must_not"}[condition.operator]
    group: dict[str, Any] = {name: [*map(_translate, condition.filters)]}
    return models.Filter(**group)


def _comparison(comparison: Comparison) -> "models.Filter":
    from qdrant_client import models

    key, operator, values = _path(comparison.key), comparison.operator, comparison.values
    if operator not in ("$in", "$nin"):
        if isinstance(values[0], str):
            name = f"where: {shortened(comparison.key)}: {operator}: {shortened(values[0])}"
            raise UserError(f"{name}: expected a number, because Qdrant has no order of texts")
        bound = models.Range(**{operator.removeprefix("$"): _float(comparison.key, values[0])})
        return models.Filter(must=[models.FieldCondition(key=key, range=bound)])
    conditions = _equals(comparison.key, key, values)
    empty = models.FieldCondition(key=key, is_empty=True)
    if operator == "$nin":
        return models.Filter(must_not=[empty, *conditions])
    return models.Filter(should=conditions) if conditions else models.Filter(must=[empty], must_not=[empty])


def _equals(name: str, key: str, values: Sequence[Scalar]) -> list:
    """Return conditions, one of which holds if the value of a key is one of some values."""
    from qdrant_client import models

    texts = [value for value in values if isinstance(value, str)]
    conditions: list = [models.FieldCondition(key=key, match=models.MatchAny(any=texts))] if texts else []
    for value in values:
        if isinstance(value, bool):
            conditions.append(models.FieldCondition(key=key, match=models.MatchValue(value=value)))
        elif not isinstance(value, str):  # a match of a number would not find 1.0 by 1
            number = _float(name, value)
            conditions.append(models.FieldCondition(key=key, range=models.Range(gte=number, lte=number)))
    return conditions


def _float(name: str, number: Scalar) -> float:
    if isinstance(number, str) or not -EXACT_BELOW < number < EXACT_BELOW:
        raise UserError(f"where: {shortened(name)}: {shortened(number)}: expected less than 2**53, because Qdrant compares floats")
    return float(number)


def _path(key: str) -> str:
    """Return a key as a path of JSON."""
    if PLAIN_KEY.fullmatch(key):
        return key
    if not key or '"' in key:
        raise UserError(f"where: {shortened(key)}: expected a key for Qdrant: not empty, without quotation marks")
    return f'"{key}"'
