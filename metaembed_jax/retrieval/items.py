"""What goes into an index: vectors of any number an item, texts that name the items, and what else is known of them.

N items, R vectors of an item at most, D width of a vector.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import ml_dtypes  # noqa: F401  so that NumPy knows bfloat16
import numpy as np
from jaxtyping import Float, Int, UInt64

from metaembed_jax.errors import UserError

# Vectors have length one, within what bfloat16 (eight bits) makes of them.
TOLERANCE = 1e-2
BLOCK = 1024  # items that are checked and written at once
STRETCHED = 256  # numbers of a vector, over all the ways in which it is rounded to int8


class Items(NamedTuple):
    """Items, checked.

    Attributes:
      ids: texts.
      vectors_NRD: float32; what is behind an item's vectors is zero.
      counts_N: int32, how many vectors each has, from 1.
      metadata: a JSON object of each.
    """

    ids: list[str]
    vectors_NRD: Float[np.ndarray, "N R D"]
    counts_N: Int[np.ndarray, " N"]
    metadata: list[str]


def make_items(vectors, ids: Sequence[str], metadata: Sequence[dict | None] | None, vectors_kept: int | None) -> Items:
    """Checks items as they come from outside.

    Args:
      vectors: [N, R, D], or a list of [R_n, D]; of any float type.
      vectors_kept: the first vectors of an item that are kept; None for all.

    Raises:
      UserError: names the item that has something wrong.
    """
    ids = as_ids(ids)
    arrays = vectors if isinstance(vectors, Sequence) else as_array(vectors, "vectors")
    if len(arrays) != len(ids):
        raise UserError(f"there are {len(ids)} ids for {len(arrays)} items; give one for each")
    if isinstance(arrays, Sequence):
        arrays = [as_array(one, f"the vectors of item {name!r}") for one, name in zip(arrays, ids, strict=True)]
    vectors_NRD, counts_N = _pad(arrays, ids, vectors_kept)
    check_unit(vectors_NRD, counts_N, [f"item {name!r}" for name in ids])
    return Items(ids, vectors_NRD, counts_N, _as_json(ids, metadata))


def as_ids(ids: Iterable[str]) -> list[str]:
    """A list of ids.

    Raises:
      UserError: it is none, or an id is no text, or empty.
    """
    ids = _as_list(ids, "ids")
    for number, name in enumerate(ids):
        if not isinstance(name, str) or not name or not _is_encodable(name):
            raise UserError(f"id {name!r} of item {number}: ids are texts, and not empty; write str(id)")
    return ids


def as_array(given, what: str) -> np.ndarray:
    """An array of numbers, of any type that can become float32.

    Raises:
      UserError: it is something else.
    """
    try:
        array = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:  # tensors of others say why they are none in many ways
        raise UserError(f"{what}: expected an array of numbers ({error})") from error
    if not array.ndim or not np.can_cast(array.dtype, np.float32, "same_kind"):
        raise UserError(f"{what}: expected an array of real numbers, not a {type(given).__name__} of {array.dtype}")
    return array


def check_unit(vectors_NRD: Float[np.ndarray, "N R D"], counts_N: Int[np.ndarray, " N"], names: Sequence[str]) -> None:
    """Whether all vectors, but for padding, are of length one.

    Raises:
      UserError: names the first that is not.
    """
    lengths_NR = np.sqrt(np.einsum("nrd,nrd->nr", vectors_NRD, vectors_NRD))
    is_wrong_NR = ~(np.abs(lengths_NR - 1) <= TOLERANCE) & (np.arange(vectors_NRD.shape[1]) < counts_N[:, None])
    if is_wrong_NR.any():
        item, vector = np.argwhere(is_wrong_NR)[0]
        length = lengths_NR[item, vector]
        raise UserError(
            f"vector {vector} of {names[item]} has length {length:.4g}, not 1: "
            + ("divide each vector by its length" if np.isfinite(length) else "it holds NaN or infinities")
        )


def as_blocks(vectors, ids: Iterable[str] | None, metadata: Sequence | None) -> Iterator[tuple]:
    """Blocks (ids, vectors, metadata) of what `Index.build` takes: iterators are blocks already, all else is cut into some.

    Raises:
      UserError: a block is something else, or there is not one id for each item.
    """
    if isinstance(vectors, Iterator):
        if ids is not None or metadata is not None:
            raise UserError("blocks bring their ids and metadata themselves: (ids, vectors) or (ids, vectors, metadata)")
        for number, block in enumerate(vectors):
            if not isinstance(block, tuple) or len(block) not in (2, 3):
                raise UserError(f"block {number} is no tuple (ids, vectors) or (ids, vectors, metadata)")
            yield (*block, None)[:3]
        return
    if not np.iterable(vectors) or not hasattr(vectors, "__len__") or isinstance(vectors, dict | set | str):
        raise UserError(f"vectors are a {type(vectors).__name__}, not an array, a list or an iterator")
    ids = list(map(str, range(len(vectors)))) if ids is None else _as_list(ids, "ids")
    metadata = None if metadata is None else _as_list(metadata, "metadata")
    for name, given in (("ids", ids), ("metadata", metadata)):
        if given is not None and len(given) != len(vectors):
            raise UserError(f"{name}: there are {len(given)} for {len(vectors)} items; give one for each")
    for start in range(0, len(vectors), BLOCK):
        some = slice(start, start + BLOCK)
        yield ids[some], vectors[some], None if metadata is None else metadata[some]


def longest(vectors) -> int:
    """How many vectors an item has at most, as far as it can be seen without reading blocks."""
    return max((len(one) for one in vectors), default=1) if isinstance(vectors, Sequence) else 1


def hashes(ids: Iterable[str]) -> UInt64[np.ndarray, " N"]:
    """A number for each id, for finding it among many."""
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(b"".join(digests), np.uint64)


def to_int8(vectors_NRD: Float[np.ndarray, "N R D"]) -> tuple[np.ndarray, Float[np.ndarray, "N R"]]:
    """(int8 [N, R, D], scales): the vector is about int8 * scale. A vector of zeros stays one, with scale 0.

    A vector is stretched until its largest number is 127, and rounded, halves to the even number. With the scale, the product of
    the vector and what is stored of it is that of the vector with itself: what a query finds lies near to it, so an error along the
    vector would count in full. Narrow vectors are stretched to 126, 125 .. as well, and what is nearest is stored.
    """
    largest_NR1 = np.abs(vectors_NRD).max(axis=2, keepdims=True, initial=0)
    stretched_NRD, square_NR = vectors_NRD / np.where(largest_NR1 > 0, largest_NR1, 1), _squares(vectors_NRD)

    def rounded(largest: int) -> tuple[np.ndarray, np.ndarray]:
        numbers_NRD = np.rint(stretched_NRD * np.float32(largest))
        along_NR = np.einsum("nrd,nrd->nr", numbers_NRD, vectors_NRD)
        return numbers_NRD, square_NR / np.where(along_NR > 0, along_NR, 1)

    stored_NRD, scales_NR = rounded(127)
    for largest in range(126, 127 - min(STRETCHED // vectors_NRD.shape[2], 32), -1):
        numbers_NRD, other_NR = rounded(largest)
        # With such scales, the shorter of two is the nearer one.
        is_nearer_NR = _squares(numbers_NRD * other_NR[..., None]) < _squares(stored_NRD * scales_NR[..., None])
        stored_NRD, scales_NR = (
            np.where(is_nearer_NR[..., None], numbers_NRD, stored_NRD),
            np.where(is_nearer_NR, other_NR, scales_NR),
        )
    return stored_NRD.astype(np.int8), scales_NR


def _squares(vectors_NRD: np.ndarray) -> np.ndarray:
    return np.einsum("nrd,nrd->nr", vectors_NRD, vectors_NRD)


def _pad(arrays: list[np.ndarray] | np.ndarray, ids: list[str], kept: int | None) -> tuple[np.ndarray, np.ndarray]:
    """float32 [N, R, D] and how many vectors each item has."""
    if isinstance(arrays, np.ndarray):
        if arrays.ndim != 3 or 0 in arrays.shape[1:]:
            raise UserError(
                f"vectors have the shape {arrays.shape}, not [items, vectors, width]; or give a list of [vectors, width]"
            )
        vectors_NRD = np.asarray(arrays[:, :kept], np.float32)
        return vectors_NRD, np.full(len(arrays), vectors_NRD.shape[1], np.int32)
    for name, array in zip(ids, arrays, strict=True):
        if array.ndim != 2 or 0 in array.shape or array.shape[1] != arrays[0].shape[1]:
            raise UserError(
                f"the vectors of item {name!r} have the shape {array.shape}: expected [vectors, width], one vector at least, "
                f"and the width of {ids[0]!r}, whose shape is {arrays[0].shape}"
            )
    arrays = [array[:kept] for array in arrays]
    counts_N = np.array([len(array) for array in arrays], np.int32)
    vectors_NRD = np.zeros((len(arrays), counts_N.max(initial=1), arrays[0].shape[1] if arrays else 1), np.float32)
    for padded, array in zip(vectors_NRD, arrays, strict=True):
        padded[: len(array)] = array
    return vectors_NRD, counts_N


def _as_json(ids: list[str], metadata: Sequence[dict | None] | None) -> list[str]:
    metadata = [None] * len(ids) if metadata is None else _as_list(metadata, "metadata")
    if len(metadata) != len(ids):
        raise UserError(f"there is metadata for {len(metadata)} of {len(ids)} items; give a dict for each, or None")
    texts = []
    for name, one in zip(ids, metadata, strict=True):
        if not isinstance(one, dict | None):
            raise UserError(f"the metadata of item {name!r} is a {type(one).__name__}, not a dict")
        try:
            texts.append(json.dumps(one or {}, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"the metadata of item {name!r} cannot be written as JSON ({error})") from error
    return texts


def _as_list(given: Iterable, what: str) -> list:
    if isinstance(given, dict | str) or not np.iterable(given):
        raise UserError(f"{what} are a {type(given).__name__}, not a list")
    return list(given)


def _is_encodable(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False
