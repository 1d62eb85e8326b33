"""The stored items that match a filter: comparisons of columns of metadata.

N stored items, also deleted ones, n values of a column.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool

from metaembed_jax.errors import UserError, shortened
from metaembed_jax.retrieval import columns
from metaembed_jax.retrieval.columns import BOOL, FLOAT, INT, INT_MAX, INT_MIN, LONG, TEXT, Scalar, Values
from metaembed_jax.retrieval.filters import Comparison, comparisons, evaluate, parse_filter
from metaembed_jax.retrieval.segment import SegmentFiles

NUMBERS = (INT, FLOAT, LONG)
NAMES = {TEXT: "texts", BOOL: "true or false"} | dict.fromkeys(NUMBERS, "numbers")  # of kinds, in errors
KEYS_IN_ERRORS = 20
# Functions of NumPy, which compare integers of 64 bits with any integer of Python exactly, and of Arrow, for texts.
NUMPY: dict[str, Callable] = {"$gt": np.greater, "$gte": np.greater_equal, "$lt": np.less, "$lte": np.less_equal}
ARROW = {"$gt": "greater", "$gte": "greater_equal", "$lt": "less", "$lte": "less_equal"}


def match_items(segments: Sequence[SegmentFiles], where: Mapping) -> Bool[np.ndarray, " N"]:
    """Return a mask of the items that match a filter and are not deleted.

    Raises:
      UserError: the filter is wrong, no item has a key or kind of value that it names, or a file is damaged.
    """
    condition = parse_filter(where)
    for comparison in comparisons(condition):
        _check_key(segments, comparison)
    masks = [np.zeros(0, bool)]
    for segment in segments:
        mask_N = evaluate(condition, functools.partial(_compare, segment), segment.is_alive)
        masks.append(mask_N & segment.is_alive)
        segment.columns.release()
    return np.concatenate(masks)


def _check_key(segments: Sequence[SegmentFiles], comparison: Comparison) -> None:
    """Check that a comparison names a key that some item has, with a value of its kind.

    Raises:
      UserError: no item has, or a segment has no column of the key though its items may have it.
    """
    key, held, known, is_nested = comparison.key, set(), set(), False
    for segment in segments:
        kinds, nested = segment.columns.kinds, segment.columns.nested
        if segment.columns.has_more and key not in kinds and key not in nested:
            raise UserError(
                f"where: {shortened(key)} is not among the first {columns.MOST_KEYS:,} keys of the metadata in {segment.folder}; "
                "expected one of these; index again with fewer keys"
            )
        held |= kinds.get(key, set())
        known |= kinds.keys()
        is_nested |= key in nested
    if not held and is_nested:
        raise UserError(f"where: {shortened(key)} holds lists or objects; expected a key of texts, numbers, true or false")
    if not held:
        raise UserError(f"where: no item has the key {shortened(key)}; {_list_keys(known)}")
    compared = _comparable(comparison)
    if compared and not held & compared:
        raise UserError(f"where: {shortened(key)} holds {_names(held)}, and no {_names(compared)} to compare; change the value")


def _list_keys(keys: set[str]) -> str:
    shown = ", ".join(map(shortened, sorted(keys)[:KEYS_IN_ERRORS]))
    more = f" and {len(keys) - KEYS_IN_ERRORS:,} more" if len(keys) > KEYS_IN_ERRORS else ""
    return f"known keys: {shown}{more}" if keys else "no item has metadata to compare"


def _names(kinds: set[str]) -> str:
    return " and ".join(sorted({NAMES[kind] for kind in kinds}))


def _comparable(comparison: Comparison) -> set[str]:
    """Return the kinds of values for which a comparison may hold."""
    kinds = {columns.kind_of(value) for value in comparison.values}
    return kinds | {*NUMBERS} if kinds.intersection(NUMBERS) else kinds


def _compare(segment: SegmentFiles, comparison: Comparison) -> Bool[np.ndarray, " N"]:
    """Return a mask of the items of a segment for which a comparison holds."""
    key, operator, values = comparison
    is_match_N = np.zeros(len(segment), bool)
    for column in segment.columns.read(key, _comparable(comparison)):
        is_match_n = _is_in(column, values) if operator in ("$in", "$nin") else _is_beyond(column, operator, values[0])
        is_match_N[column.rows[is_match_n]] = True
    if operator != "$nin":
        return is_match_N
    has_key_N = np.zeros(len(segment), bool)
    for column in segment.columns.read(key, columns.KINDS):
        has_key_N[column.rows] = True
    return has_key_N & ~is_match_N


def _is_in(column: Values, values: Sequence[Scalar]) -> Bool[np.ndarray, " n"]:
    """Return a mask of the values of a column that equal one of some values."""
    import pyarrow
    import pyarrow.compute

    if column.kind == TEXT:
        texts = pyarrow.array([columns.encode_text(text) for text in values if isinstance(text, str)], column.values.type)
        if len(texts) == 1:  # twice to ten times as fast
            return pyarrow.compute.call_function("equal", [column.values, texts[0]]).to_numpy(zero_copy_only=False)
        options = pyarrow.compute.SetLookupOptions(value_set=texts)
        return pyarrow.compute.call_function("is_in", [column.values], options).to_numpy(zero_copy_only=False)
    if column.kind == BOOL:
        return np.isin(column.values, [value for value in values if isinstance(value, bool)])
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if column.kind == LONG:
        return np.isin(column.values, np.array([*numbers, None], object)[:-1])  # with None, the array is of objects
    if column.kind == INT:
        integers = [int(number) for number in numbers if isinstance(number, int) or number.is_integer()]
        return np.isin(column.values, np.array([number for number in integers if INT_MIN <= number <= INT_MAX], np.int64))
    nearest = [(_nearest_float(number), number) for number in numbers]
    return np.isin(column.values, np.array([rounded for rounded, number in nearest if rounded == number], np.float64))


def _is_beyond(column: Values, operator: str, bound) -> Bool[np.ndarray, " n"]:
    """Return a mask of the values of a column that are on the side of a bound that the operator names."""
    import pyarrow
    import pyarrow.compute

    if column.kind == TEXT:
        text = pyarrow.scalar(columns.encode_text(bound), column.values.type)
        return pyarrow.compute.call_function(ARROW[operator], [column.values, text]).to_numpy(zero_copy_only=False)
    if column.kind == INT and isinstance(bound, float) and math.isfinite(bound):
        # An integer is above 2.5 if it is above 2, and below 2.5 if it is below 3.
        bound = math.floor(bound) if operator in ("$gt", "$lte") else math.ceil(bound)
    elif column.kind == FLOAT and (nearest := _nearest_float(bound)) != bound:
        # No float equals this integer, and none is between it and the nearest.
        is_above, bound = nearest > bound, nearest
        operator = {"$gt": "$gte" if is_above else "$gt", "$lt": "$lt" if is_above else "$lte"}[operator.removesuffix("e")]
    return NUMPY[operator](column.values, bound).astype(bool)  # objects of Python for LONG


def _nearest_float(number: float) -> float:
    """Return the float that is nearest to a number; an infinity beyond the largest."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf
