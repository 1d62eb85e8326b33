"""Points of Qdrant for items: their ids, payloads and stamps, and the sizes of requests."""

import json
import uuid
from collections.abc import Iterator, Sequence

from metaembed_jax.errors import UserError

REQUEST_BYTES = 28 << 20  # a server takes 32 MiB by default
NUMBER_BYTES = 24  # of a float32 in JSON, at most
REQUEST_ITEMS = 64  # of a request, at most
STAMP = "metaembed_stamp"  # key of a payload, for the hash of the item that `qdrant_following` wrote


def as_points(ids: Sequence[str]) -> list[str]:
    """Return the UUIDs of the points of items, which depend on the ids alone.

    Raises:
      UserError: an id is not a text, or is given twice.
    """
    if isinstance(ids, str) or not hasattr(ids, "__len__"):
        raise UserError(f"ids={ids!r}: expected a list of ids")
    numbers: dict[str, int] = {}
    for number, item in enumerate(ids):
        if not isinstance(item, str) or not item:
            raise UserError(f"id {item!r} at number {number}: expected a text that is not empty")
        if item in numbers:
            raise UserError(
                f"id {item!r} is given twice, at numbers {numbers[item]} and {number}; expected a unique id for each item"
            )
        numbers[item] = number
    try:
        return [str(uuid.uuid5(uuid.NAMESPACE_URL, item)) for item in ids]
    except UnicodeEncodeError as error:
        raise UserError(f"id {error.object!r}: expected text that can be encoded in UTF-8") from None


def as_payload(item: str, metadata: dict, stamp: str = "") -> bytes:
    """Return the metadata of an item, with its id and stamp, as JSON.

    Raises:
      UserError: the metadata is not a dict of JSON values, or has a key that is used otherwise.
    """
    if not isinstance(metadata, dict) or metadata.get("id", item) != item or STAMP in metadata:
        raise UserError(
            f"item {item!r}: its metadata is {str(metadata)[:100]}; expected a dict without another id, and without {STAMP!r}"
        )
    try:
        fields = {**metadata, "id": item} | ({STAMP: stamp} if stamp else {})
        text = json.dumps(fields, ensure_ascii=False, allow_nan=False)
        json.loads(text, parse_int=_check_integer)
        return text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"item {item!r}: its metadata cannot be written as JSON ({error})") from None


def _check_integer(digits: str) -> None:
    """Refuse an integer that Qdrant would store as a float."""
    if not -(2**63) <= int(digits) < 2**64:
        raise ValueError(f"{digits[:40]} is beyond 64 bits")


def as_metadata(payload: dict) -> dict:
    """Return the metadata of a payload, with the id of the item; inverse of `as_payload`."""
    return {key: value for key, value in payload.items() if key != STAMP}


def as_requests(sizes: Sequence[int]) -> Iterator[range]:
    """Yield the rows of each request: at most REQUEST_ITEMS, and at most REQUEST_BYTES unless a single row is larger."""
    start, total = 0, 0
    for row, size in enumerate(sizes):
        if row > start and (row - start == REQUEST_ITEMS or total + size > REQUEST_BYTES):
            yield range(start, row)
            start, total = row, 0
        total += size
    if start < len(sizes):
        yield range(start, len(sizes))
