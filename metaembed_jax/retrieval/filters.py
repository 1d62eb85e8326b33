"""Filters of a search by metadata, in the language of MongoDB: {"lang": "en", "page": {"$gte": 2, "$lt": 9}}.

A condition on a key is met by items that have a text, number, true or false of that key for which it holds. Numbers are compared
exactly, whether they are integers or not; texts by their characters; true and false equal only themselves.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from metaembed_jax.errors import UserError, shortened
from metaembed_jax.retrieval.columns import Scalar

SETS, ORDERS = ("$in", "$nin"), ("$gt", "$gte", "$lt", "$lte")
EQUAL = {"$eq": "$in", "$ne": "$nin"}  # of a single value
OPERATORS = (*EQUAL, *ORDERS, *SETS)
GROUPS = ("$and", "$or", "$not")
DEEPEST = 50  # groups inside each other
EXAMPLE = 'such as {"lang": "en"}, {"page": {"$gte": 2, "$lt": 9}} or {"kind": {"$in": ["a", "b"]}}'


class Comparison(NamedTuple):
    """A condition on a key.

    Attributes:
      key: of the metadata.
      operator: "$in", "$nin", or one of `ORDERS`.
      values: what the item's value is compared with: a single one for `ORDERS`.
    """

    key: str
    operator: str
    values: tuple[Scalar, ...]


class Group(NamedTuple):
    """Filters of which all, one, or none must hold.

    Attributes:
      operator: "$and", "$or", or "$not", which has one filter.
      filters: in the order of the user.
    """

    operator: str
    filters: tuple["Filter", ...]


Filter = Comparison | Group


def parse_filter(where: Mapping) -> Filter:
    """Parse the filter of a user.

    Raises:
      UserError: an operator is unknown or a value has a wrong type, which the error names.
    """
    try:
        return _parse(where, 0)
    except RecursionError:  # an error shows the value, whose text may be nested too deeply
        raise UserError("where: expected texts, numbers, true and false as values, not lists inside lists") from None


def comparisons(condition: Filter) -> Iterator[Comparison]:
    """Yield all comparisons of a filter."""
    if isinstance(condition, Comparison):
        yield condition
        return
    for inner in condition.filters:
        yield from comparisons(inner)


def evaluate(condition: Filter, compare: Callable[[Comparison], Any], all_items: Any) -> Any:
    """Return the mask of a filter from those of its comparisons.

    Args:
      compare: returns the mask of a comparison.
      all_items: a mask of all items, for "$and" of no filters.
    """
    if isinstance(condition, Comparison):
        return compare(condition)
    masks = (evaluate(inner, compare, all_items) for inner in condition.filters)
    if condition.operator == "$not":
        return ~next(masks)
    result = next(masks, all_items)
    for mask in masks:
        result = result & mask if condition.operator == "$and" else result | mask
    return result


def _parse(where, depth: int) -> Filter:
    if not isinstance(where, Mapping):
        raise UserError(f"where={shortened(where)}: expected a dict, {EXAMPLE}")
    if depth > DEEPEST:
        raise UserError(f"where: expected at most {DEEPEST} groups inside each other")
    filters = tuple(condition for key, value in where.items() for condition in _parse_entry(key, value, depth))
    return filters[0] if len(filters) == 1 else Group("$and", filters)


def _parse_entry(key, value, depth: int) -> list[Filter]:
    """Return the filters of an entry of a dict, all of which must hold."""
    if not isinstance(key, str):
        raise UserError(f"where: the key {shortened(key)}: expected a text")
    if key == "$not":
        return [Group(key, (_parse(value, depth + 1),))]
    if key in GROUPS:
        if not isinstance(value, list | tuple) or not value:
            raise UserError(f"where: {key}: {shortened(value)}: expected a list of filters, at least one")
        return [Group(key, tuple(_parse(inner, depth + 1) for inner in value))]
    if key.startswith("$"):
        raise UserError(f"where: unknown operator {shortened(key)}; allowed here: {', '.join(GROUPS)}, or a key of the metadata")
    if not isinstance(value, Mapping):
        return [_comparison(key, "$eq", value)]
    if not value:
        raise UserError(f"where: {shortened(key)}: expected a value or operators, {EXAMPLE}, not an empty dict")
    return [_comparison(key, operator, operand) for operator, operand in value.items()]


def _comparison(key: str, operator: str, value) -> Comparison:
    if operator not in OPERATORS:
        raise UserError(f"where: {shortened(key)}: unknown operator {shortened(operator)}; allowed: {', '.join(OPERATORS)}")
    name = f"where: {shortened(key)}: {operator}: {shortened(value)}"
    if operator in SETS:
        if not isinstance(value, list | tuple | set | frozenset):
            raise UserError(f"{name}: expected a list of values")
        return Comparison(key, operator, tuple(_scalar(item, name) for item in value))
    value = _scalar(value, name)
    if operator in ORDERS and isinstance(value, bool):
        raise UserError(f"{name}: expected a number or a text, which have an order")
    return Comparison(key, EQUAL.get(operator, operator), (value,))


def _scalar(value, name: str) -> Scalar:
    """Check a value of a comparison, and return it as one of Python if it is NumPy's."""
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
    if not isinstance(value, str | bool | int | float) or (isinstance(value, float) and math.isnan(value)):
        raise UserError(f"{name}: expected a text, a number, true or false; an item without the key matches no comparison")
    return value
