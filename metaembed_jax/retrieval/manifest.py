"""The manifest of an index, which lists its segments. It is written last, so every segment that it names is complete.

manifest.json is {"sha256": of the index, "index": {...}}. It names folders by 16 hex digits and files by fixed names, so no path in
it leads out of the index's folder.
"""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

from metaembed_jax.errors import UserError, one_line
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.retrieval.checksummed_files import open_regular

FORMAT = 3
DTYPES = ("bfloat16", "float32", "int8")  # of stored vectors
EXACT_DTYPES = ("bfloat16", "float32")  # of the vectors next to those of int8
LEVEL_ENDS = (1, 4, 8, 16, 64)  # the document vectors of the usual budgets
MANIFEST_BYTES = 2**28  # largest size of the file
NAME = re.compile("[0-9a-f]{16}")
DIGEST = re.compile("[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class Segment:
    """Items that are written together. They may be deleted, but never change.

    Attributes:
      name: name of its folder, 16 hex digits.
      items: number of items.
      fewest: the fewest vectors of an item.
      sizes: bytes of each file.
      checksums: SHA-256 of the file of checksums.
      deleted: rows of deleted items, ascending.
    """

    name: str
    items: int
    fewest: int
    sizes: dict[str, int]
    checksums: str
    deleted: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The survivors of a first stage with which a share of all queries loses none of its k best items.

    Attributes:
      first: budget of the first stage.
      last: budget of the second stage, whose k best items must survive.
      k: results of a search.
      coverage: the share of queries.
      confidence: the probability, over samples of queries, that the share is at least `coverage`.
      survivors: the documents that the second stage scores.
      queries: size of the sample.
      items: number of items that were searched.
    """

    first: Budget
    last: Budget
    k: int
    coverage: float
    confidence: float
    survivors: int
    queries: int
    items: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Description of an index.

    Attributes:
      width: numbers of a vector, D.
      levels: numbers of vectors at which the levels end, ascending; the last is the most vectors of an item.
      dtype: type of the stored vectors, one of `DTYPES`.
      segments: segments in the order of their items.
      model: {"name", "fingerprint"} of the model that encoded the items; None if it is unknown.
      exact: type of the vectors that are stored next to those of int8, one of `EXACT_DTYPES`; None without them.
      settings: digest of the model, processor, budget and types of an index by `index_documents`; empty for other indexes.
      left_out: (id, reason, stamp) of each document of the job that was left out.
      calibrations: results of `Index.calibrate`, in order.
    """

    width: int
    levels: tuple[int, ...]
    dtype: str
    segments: tuple[Segment, ...] = ()
    model: dict[str, str] | None = None
    exact: str | None = None
    settings: str = ""
    left_out: tuple[tuple[str, str, int], ...] = ()
    calibrations: tuple[Calibration, ...] = ()


def check_types(dtype: str, exact: str | None) -> None:
    """Check the types of an index's vectors.

    Raises:
      UserError: the type is not one of `DTYPES`; or that of exact vectors not one of `EXACT_DTYPES`, or the index is not int8.
    """
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}: expected {', '.join(DTYPES)}")
    if exact is None:
        return
    if not isinstance(exact, str) or exact not in EXACT_DTYPES:
        raise UserError(f"exact={exact!r}: expected {' or '.join(EXACT_DTYPES)}")
    if dtype != "int8":
        raise UserError(f"exact={exact!r} of an index of {dtype}: expected dtype='int8'; only int8 has exact vectors next to it")


def levels_of(vectors: int) -> tuple[int, ...]:
    """Return the levels of items with this number of vectors: 10 -> (1, 4, 8, 10)."""
    return (*(end for end in LEVEL_ENDS if end < vectors), vectors)


def level_names(manifest: Manifest) -> list[str]:
    """Return the names of the levels in file names: "0-1" for vectors [0, 1), and so on."""
    return [f"{start}-{end}" for start, end in zip((0, *manifest.levels), manifest.levels, strict=False)]


def encode(manifest: Manifest) -> bytes:
    """Return the content of manifest.json; inverse of `decode`."""
    index = {"format": FORMAT, **dataclasses.asdict(manifest)}
    for calibration in index["calibrations"]:
        calibration |= {"first": calibration["first"].sizes, "last": calibration["last"].sizes}
    text = json.dumps({"sha256": _digest(index), "index": index}, indent=1, ensure_ascii=False)
    return (text + "\n").encode(errors="surrogatepass")  # the path of a model may be any bytes


def decode(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
      UserError: the file is damaged or of another version, or the path is not a file.
      FileNotFoundError: the file is missing.
    """
    with open_regular(path) as file:
        content = file.read(MANIFEST_BYTES + 1)
    try:
        _require(len(content) <= MANIFEST_BYTES, "too large")
        stored = json.loads(content)
        index, digest = stored["index"], stored["sha256"]
        _require(digest == _digest(index), "its checksum does not match")
        _require(isinstance(index, dict), "no index")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)[:100]}); remove it and build the index again") from error
    if index.pop("format", None) != FORMAT:
        raise UserError(f"{path} is of another version of this program; remove it and index again")
    try:
        return _validated(index)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not valid ({one_line(error)[:100]}); remove it and build the index again") from error


def _validated(index: dict) -> Manifest:
    """Check all fields: another program may have written a file with a matching checksum."""
    segments = tuple(as_segment(**fields) for fields in index.pop("segments"))
    levels = tuple(index.pop("levels"))
    left_out = tuple((item, reason, stamp) for item, reason, stamp in index.pop("left_out"))
    calibrations = tuple(_as_calibration(**fields) for fields in index.pop("calibrations"))
    manifest = Manifest(segments=segments, levels=levels, left_out=left_out, calibrations=calibrations, **index)
    is_described = _is_count(manifest.width) and manifest.dtype in DTYPES and isinstance(manifest.settings, str)
    _require(is_described, "width, dtype or settings")
    is_exact = manifest.dtype == "int8" and manifest.exact in EXACT_DTYPES
    _require(manifest.exact is None or is_exact, "exact")
    model = manifest.model
    _require(levels and all(map(_is_count, levels)) and list(levels) == sorted(set(levels)), "levels")
    is_model = model is None or (model.keys() == {"name", "fingerprint"} and all(isinstance(text, str) for text in model.values()))
    _require(is_model, "model")
    _require(len({segment.name for segment in segments}) == len(segments), "a segment is named twice")
    _require(all(segment.fewest <= levels[-1] for segment in segments), "fewest")
    are_texts = all(isinstance(item, str) and isinstance(reason, str) for item, reason, _ in left_out)
    _require(are_texts and all(type(stamp) is int and 0 <= stamp < 2**64 for *_, stamp in left_out), "left_out")
    return manifest


def _as_calibration(first, last, k, coverage, confidence, survivors, queries, items) -> Calibration:
    """Return the calibration of the fields of its JSON object, in which budgets are their `sizes`."""
    _require(all(len(sizes) in (2, 3) for sizes in (first, last)), "the budgets of a calibration")
    _require(all(map(_is_count, (*first, *last, k, survivors, queries, items))) and k <= survivors, "a calibration")
    shares = coverage, confidence
    _require(all(type(share) is float and 0 < share < 1 for share in shares), "coverage or confidence")
    return Calibration(Budget(*first), Budget(*last), k, coverage, confidence, survivors, queries, items)


def as_segment(name, items, fewest, sizes, checksums, deleted) -> Segment:
    """Return the segment of the fields of its JSON object; inverse of `dataclasses.asdict`.

    Raises:
      ValueError: a field is not valid.
    """
    _require(isinstance(name, str) and NAME.fullmatch(name), "the name of a segment")
    _require(isinstance(checksums, str) and DIGEST.fullmatch(checksums), "checksums")
    _require(_is_count(items) and _is_count(fewest), "items or fewest")
    _require(all(type(size) is int and size >= 0 for size in sizes.values()), "sizes")
    _require(all(type(row) is int and 0 <= row < items for row in deleted) and deleted == sorted(set(deleted)), "deleted")
    return Segment(name, items, fewest, dict(sizes), checksums, tuple(deleted))


def _is_count(number) -> bool:
    return type(number) is int and 0 < number < 2**31


def _require(condition, reason: str) -> None:
    if not condition:
        raise ValueError(reason)


def _digest(index: dict) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
