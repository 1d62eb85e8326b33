"""Checks of the vectors, ids and metadata that go into an index, and the rounding of vectors to int8.

N items, R most vectors of an item, D width of a vector.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np
from jaxtyping import Float, Float16, Int, Int8, UInt64

from metaembed_jax.errors import UserError

TOLERANCE = 1e-2  # of the length of a vector, for the rounding of bfloat16 (eight bits)
BLOCK_ITEMS = 1024  # items that are checked and written at once
ROUNDED_NUMBERS = 256  # numbers that are rounded for a vector, over all scales that are tried for int8


class Items(NamedTuple):
    """Items that passed all checks.

    Attributes:
      ids: texts.
      vectors_NRD: float32; items with fewer vectors are padded with zeros.
      counts_N: int32, vectors of each item, at least 1.
      metadata: a JSON object for each item.
    """

    ids: list[str]
    vectors_NRD: Float[np.ndarray, "N R D"]
    counts_N: Int[np.ndarray, " N"]
    metadata: list[str]


def make_items(vectors, ids: Sequence[str], metadata: Sequence[dict | None] | None, budget: int | None) -> Items:
    """Check items that a user gives.

    Args:
      vectors: [N, R, D], or a list of [R_n, D]; of any float type.
      budget: vectors of each item to keep, from the first; None keeps all.

    Raises:
      UserError: an item is wrong, which the error names.
    """
    ids = as_ids(ids)
    arrays = vectors if isinstance(vectors, Sequence) else as_array(vectors, "vectors")
    if len(arrays) != len(ids):
        raise UserError(f"{len(ids)} ids for {len(arrays)} items: expected one id for each item")
    if isinstance(arrays, Sequence):
        arrays = [as_array(array, f"the vectors of item {item!r}") for array, item in zip(arrays, ids, strict=True)]
    vectors_NRD, counts_N = _pad(arrays, ids, budget)
    check_unit(vectors_NRD, counts_N, [f"item {item!r}" for item in ids])
    return Items(ids, vectors_NRD, counts_N, _as_json(ids, metadata))


def as_ids(ids: Iterable[str]) -> list[str]:
    """Check ids, and return them as a list.

    Raises:
      UserError: the ids are not a list, or one of them is not a text, or is empty.
    """
    ids = _as_list(ids, "ids")
    for number, item in enumerate(ids):
        if not isinstance(item, str) or not item or not _is_encodable(item):
            raise UserError(f"id {item!r} of item {number}: expected a text that is not empty; write str(id)")
    return ids


def as_array(value, name: str) -> np.ndarray:
    """Return a value as an array of numbers that can be converted to float32.

    Raises:
      UserError: the value is something else.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # other libraries' tensors refuse to convert with various errors
        raise UserError(f"{name}: expected an array of numbers ({error})") from error
    if not array.ndim or not np.can_cast(array.dtype, np.float32, "same_kind"):
        raise UserError(f"{name}: expected an array of real numbers, not a {type(value).__name__} of {array.dtype}")
    return array


def check_unit(vectors_NRD: Float[np.ndarray, "N R D"], counts_N: Int[np.ndarray, " N"], names: Sequence[str]) -> None:
    """Check that all vectors except padding have length one.

    Raises:
      UserError: a vector has another length; the error names the first.
    """
    lengths_NR = np.sqrt(np.einsum("nrd,nrd->nr", vectors_NRD, vectors_NRD))
    is_wrong_NR = ~(np.abs(lengths_NR - 1) <= TOLERANCE) & (np.arange(vectors_NRD.shape[1]) < counts_N[:, None])
    if is_wrong_NR.any():
        item, vector = np.argwhere(is_wrong_NR)[0]
        length = lengths_NR[item, vector]
        raise UserError(f"vector {vector} of {names[item]} has length {length:.4g}, not 1: " + _advice(length))


def _advice(length: float) -> str:
    if not np.isfinite(length):
        return "it holds NaN or infinities"
    return "divide each vector by its length" if length else "it is zero and has no direction; leave it out"


def as_blocks(vectors, ids: Iterable[str] | None, metadata: Sequence | None) -> Iterator[tuple]:
    """Yield the arguments of `Index.build` as blocks (ids, vectors, metadata). An iterator of vectors already yields blocks.

    Raises:
      UserError: a block has another form, or the numbers of ids and items differ.
    """
    if isinstance(vectors, Iterator):
        if ids is not None or metadata is not None:
            raise UserError(
                "ids and metadata of an iterator: expected them in its blocks, (ids, vectors) or (ids, vectors, metadata)"
            )
        for number, block in enumerate(vectors):
            if not isinstance(block, tuple) or len(block) not in (2, 3):
                raise UserError(f"block {number} is not a tuple; expected (ids, vectors) or (ids, vectors, metadata)")
            yield (*block, None)[:3]
        return
    if not _is_list_of_arrays(vectors):
        raise UserError(f"vectors: expected an array, a list or an iterator, not a {type(vectors).__name__}")
    ids = list(map(str, range(len(vectors)))) if ids is None else _as_list(ids, "ids")
    metadata = None if metadata is None else _as_list(metadata, "metadata")
    for name, values in (("ids", ids), ("metadata", metadata)):
        if values is not None and len(values) != len(vectors):
            raise UserError(f"{name}: {len(values)} for {len(vectors)} items; expected one for each item")
    for start in range(0, len(vectors), BLOCK_ITEMS):
        block = slice(start, start + BLOCK_ITEMS)
        yield ids[block], vectors[block], None if metadata is None else metadata[block]


def _is_list_of_arrays(vectors) -> bool:
    return np.iterable(vectors) and hasattr(vectors, "__len__") and not isinstance(vectors, dict | set | str)


def most_vectors(vectors) -> int:
    """Return the most vectors of an item in a list; 1 for an array, whose items are alike, and for an iterator, which is unread."""
    return max((len(array) for array in vectors), default=1) if isinstance(vectors, Sequence) else 1


def hashes(ids: Iterable[str]) -> UInt64[np.ndarray, " N"]:
    """Return a hash of each id."""
    digests = (hashlib.blake2b(item.encode(), digest_size=8).digest() for item in ids)
    return np.frombuffer(b"".join(digests), np.uint64)


def to_int8(vectors_NRD: Float[np.ndarray, "N R D"]) -> tuple[np.ndarray, Float[np.ndarray, "N R"]]:
    """Round vectors to int8 [N, R, D] and a scale each; their product is close to the vector. A vector of zeros has scale 0.

    A vector is scaled so that its largest number is 127, and rounded, halves to even. The scale is chosen so that the vector has
    the same dot product with its rounded version as with itself. Queries that match a vector are close to it, so an error along the
    vector would change their scores most. Narrow vectors are also scaled to 126, 125, ..., and the closest result is stored.
    """
    largest_NR1 = np.abs(vectors_NRD).max(axis=2, keepdims=True, initial=0)
    scaled_NRD, square_NR = vectors_NRD / np.where(largest_NR1 > 0, largest_NR1, 1), _squares(vectors_NRD)

    def rounded(largest: int) -> tuple[np.ndarray, np.ndarray]:
        numbers_NRD = np.rint(scaled_NRD * np.float32(largest))
        along_NR = np.einsum("nrd,nrd->nr", numbers_NRD, vectors_NRD)
        return numbers_NRD, square_NR / np.where(along_NR > 0, along_NR, 1)

    stored_NRD, scales_NR = rounded(127)
    for largest in range(126, 127 - min(ROUNDED_NUMBERS // vectors_NRD.shape[2], 32), -1):
        numbers_NRD, other_NR = rounded(largest)
        # With these scales, the shorter of two rounded vectors is the closer one.
        is_nearer_NR = _squares(numbers_NRD * other_NR[..., None]) < _squares(stored_NRD * scales_NR[..., None])
        stored_NRD, scales_NR = (
            np.where(is_nearer_NR[..., None], numbers_NRD, stored_NRD),
            np.where(is_nearer_NR, other_NR, scales_NR),
        )
    return stored_NRD.astype(np.int8), scales_NR


def rounding_errors(
    exact_NRD: np.ndarray, numbers_NRD: Int8[np.ndarray, "N R D"], scales_NR: Float[np.ndarray, "N R"]
) -> Float16[np.ndarray, "N R"]:
    """Return the length of the difference between vectors, of any float type, and their int8 version; float16, rounded up."""
    lengths_NR = np.zeros(scales_NR.shape)
    for item, (exact_RD, numbers_RD, scales_R) in enumerate(zip(exact_NRD, numbers_NRD, scales_NR, strict=True)):
        difference_RD = exact_RD.astype(float) - numbers_RD * scales_R.astype(float)[:, None]
        lengths_NR[item] = np.sqrt(np.einsum("rd,rd->r", difference_RD, difference_RD))
    lengths_NR *= 1 + (exact_NRD.shape[2] + 8) * np.finfo(float).eps  # the most by which float64 rounds them
    with np.errstate(over="ignore", under="ignore"):
        errors_NR = lengths_NR.astype(np.float16)
    return np.where(errors_NR < lengths_NR, np.nextafter(errors_NR, np.float16(np.inf)), errors_NR)


def _squares(vectors_NRD: np.ndarray) -> np.ndarray:
    return np.einsum("nrd,nrd->nr", vectors_NRD, vectors_NRD)


def _pad(arrays: list[np.ndarray] | np.ndarray, ids: list[str], budget: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 [N, R, D] and the number of vectors of each item."""
    if isinstance(arrays, np.ndarray):
        if arrays.ndim != 3 or 0 in arrays.shape[1:]:
            raise UserError(
                f"vectors have the shape {arrays.shape}: expected [items, vectors, width], or a list of [vectors, width]"
            )
        vectors_NRD = np.asarray(arrays[:, :budget], np.float32)
        return vectors_NRD, np.full(len(arrays), vectors_NRD.shape[1], np.int32)
    for item, array in zip(ids, arrays, strict=True):
        if array.ndim != 2 or 0 in array.shape or array.shape[1] != arrays[0].shape[1]:
            raise UserError(
                f"the vectors of item {item!r} have the shape {array.shape}: expected [vectors, width], at least one vector, "
                f"and the width of {ids[0]!r}, whose shape is {arrays[0].shape}"
            )
    arrays = [array[:budget] for array in arrays]
    counts_N = np.array([len(array) for array in arrays], np.int32)
    vectors_NRD = np.zeros((len(arrays), counts_N.max(initial=1), arrays[0].shape[1] if arrays else 1), np.float32)
    for padded, array in zip(vectors_NRD, arrays, strict=True):
        padded[: len(array)] = array
    return vectors_NRD, counts_N


def _as_json(ids: list[str], metadata: Sequence[dict | None] | None) -> list[str]:
    metadata = [None] * len(ids) if metadata is None else _as_list(metadata, "metadata")
    if len(metadata) != len(ids):
        raise UserError(f"metadata: {len(metadata)} for {len(ids)} items; expected a dict or None for each item")
    texts = []
    for item, fields in zip(ids, metadata, strict=True):
        if not isinstance(fields, dict | None):
            raise UserError(f"the metadata of item {item!r}: expected a dict, not a {type(fields).__name__}")
        try:
            texts.append(json.dumps(fields or {}, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"the metadata of item {item!r} cannot be written as JSON ({error})") from error
    return texts


def _as_list(values: Iterable, name: str) -> list:
    if isinstance(values, dict | str) or not np.iterable(values):
        raise UserError(f"{name}: expected a list, not a {type(values).__name__}")
    return list(values)


def _is_encodable(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False
