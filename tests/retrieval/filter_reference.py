"""The definition of filters, in Python, and random metadata and filters."""

from hypothesis import strategies as st

KEYS = ("a", "b.c", "ключ")


def metadata_of(values):
    """Return a strategy of the metadata of an item."""
    return st.none() | st.dictionaries(st.sampled_from(KEYS), values | st.none(), max_size=3)


def filters_of(scalars, ordered):
    """Return a strategy of filters.

    Args:
      scalars: values to compare.
      ordered: values to compare with $gt, $gte, $lt and $lte.
    """
    conditions = (
        scalars
        | st.dictionaries(st.sampled_from(["$in", "$nin"]), st.lists(scalars, max_size=4), min_size=1)
        | st.dictionaries(st.sampled_from(["$eq", "$ne"]), scalars, min_size=1)
        | st.dictionaries(st.sampled_from(["$gt", "$gte", "$lt", "$lte"]), ordered, min_size=1, max_size=2)
    )
    comparisons = st.dictionaries(st.sampled_from(KEYS), conditions, max_size=2)

    def groups(inner):
        some = st.dictionaries(st.sampled_from(["$and", "$or"]), st.lists(inner, min_size=1, max_size=3), min_size=1)
        return some | st.builds(lambda part, other: {"$not": part} | other, inner, comparisons)

    return st.recursive(comparisons, groups, max_leaves=5)


def kind(value):
    """Return the group of values that a value is comparable with; None for those without a column."""
    kinds = {bool: "bool", int: "number", float: "number", str: "text"}
    return kinds.get(type(value))


def matches(where, fields):
    """Return whether a filter holds for the metadata of an item, by definition."""

    def compare(operator, value, operand):
        if kind(value) is None:
            return False
        if operator in ("$in", "$nin"):
            return any(kind(value) == kind(other) and value == other for other in operand) == (operator == "$in")
        if operator in ("$eq", "$ne"):
            return (kind(value) == kind(operand) and value == operand) == (operator == "$eq")
        if kind(value) != kind(operand):
            return False
        return {"$gt": value > operand, "$gte": value >= operand, "$lt": value < operand, "$lte": value <= operand}[operator]

    def holds(key, condition):
        if key == "$and":
            return all(matches(part, fields) for part in condition)
        if key == "$or":
            return any(matches(part, fields) for part in condition)
        if key == "$not":
            return not matches(condition, fields)
        condition = condition if isinstance(condition, dict) else {"$eq": condition}
        return all(compare(operator, fields.get(key), operand) for operator, operand in condition.items())

    return all(holds(key, condition) for key, condition in where.items())


def is_refused(where, items):
    """Return whether a filter names a key, or a kind of value of a key, that no item has."""
    refused = False
    for key, condition in where.items():
        if key in ("$and", "$or"):
            refused |= any(is_refused(part, items) for part in condition)
        elif key == "$not":
            refused |= is_refused(condition, items)
        else:
            held = {kind(fields.get(key)) for fields in items} - {None}
            for operand in condition.values() if isinstance(condition, dict) else [condition]:
                compared = {kind(value) for value in (operand if isinstance(operand, list) else [operand])}
                refused |= not held or bool(compared and not compared & held)
    return refused
