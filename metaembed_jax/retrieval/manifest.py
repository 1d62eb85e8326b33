"""The manifest of an index: what its segments are. It is written last, so what it names is whole.

manifest.json is {"sha256": of the rest, "index": {...}}. It names folders by 16 hex digits and files by fixed names, so nothing
that it says leads out of the index's folder.
"""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

from metaembed_jax.errors import UserError
from metaembed_jax.retrieval.checked import open_regular

FORMAT = 1
DTYPES = {"bfloat16": 2, "float32": 4, "int8": 1}  # bytes of a number
EDGES = (1, 4, 8, 16, 64)  # where levels end: the candidate side of the usual budgets
LARGEST = 2**28  # bytes of a manifest
NAME = re.compile("[0-9a-f]{16}")
DIGEST = re.compile("[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class Segment:
    """Items that were written together, and never change.

    Attributes:
      name: of its folder, 16 hex digits.
      items: how many.
      fewest: vectors of the item that has fewest.
      sizes: bytes of each file.
      checksums: SHA-256 of its file of checksums.
      deleted: rows that no longer count, ascending.
    """

    name: str
    items: int
    fewest: int
    sizes: dict[str, int]
    checksums: str
    deleted: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What an index is.

    Attributes:
      width: of a vector, D.
      levels: after which vectors the levels end, ascending; the last is how many vectors an item has at most.
      dtype: of the vectors as they are stored, one of `DTYPES`.
      segments: in the order of their items.
      model: {"name", "fingerprint"} of the model that made the vectors, if it is known.
      job: what is being written, or was written, by a command that can go on; empty for anything else.
    """

    width: int
    levels: tuple[int, ...]
    dtype: str
    segments: tuple[Segment, ...] = ()
    model: dict[str, str] | None = None
    job: str = ""


def levels_of(vectors: int) -> tuple[int, ...]:
    """The levels of items of so many vectors: 10 -> (1, 4, 8, 10)."""
    return (*(edge for edge in EDGES if edge < vectors), vectors)


def level_names(manifest: Manifest) -> list[str]:
    """The names of the levels' files: of vectors [0, 1) "0-1", and so on."""
    return [f"{start}-{end}" for start, end in zip((0, *manifest.levels), manifest.levels, strict=False)]


def encode(manifest: Manifest) -> bytes:
    """The manifest as the content of its file."""
    index = {"format": FORMAT, **dataclasses.asdict(manifest)}
    text = json.dumps({"sha256": _digest(index), "index": index}, indent=1, ensure_ascii=False)
    return (text + "\n").encode(errors="surrogatepass")  # as a path to a model has where it is no text


def decode(path: Path) -> Manifest:
    """Reads a manifest.

    Raises:
      UserError: the file is damaged, is no file, or of another version.
      FileNotFoundError: it is not there.
    """
    with open_regular(path) as file:
        content = file.read(LARGEST + 1)
    try:
        _need(len(content) <= LARGEST, "too large")
        stored = json.loads(content)
        index, digest = stored["index"], stored["sha256"]
        _need(digest == _digest(index), "its checksum does not fit")
        _need(isinstance(index, dict), "no index")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({_reason(error)}); remove it and build the index again") from error
    if index.pop("format", None) != FORMAT:
        raise UserError(f"{path} is of another version of this program; remove it and build the index again")
    try:
        return _checked(index)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} makes no sense ({_reason(error)}); remove it and build the index again") from error


def _checked(index: dict) -> Manifest:
    """The checksum says that the file is whole, not who wrote it."""
    segments = tuple(_segment(**one) for one in index.pop("segments"))
    manifest = Manifest(segments=segments, **index | {"levels": tuple(index["levels"])})
    _need(_is_count(manifest.width) and manifest.dtype in DTYPES and isinstance(manifest.job, str), "width, dtype or job")
    levels, model = manifest.levels, manifest.model
    _need(levels and all(map(_is_count, levels)) and list(levels) == sorted(set(levels)), "levels")
    texts = model is None or (model.keys() == {"name", "fingerprint"} and all(isinstance(text, str) for text in model.values()))
    _need(texts, "model")
    _need(len({one.name for one in segments}) == len(segments), "a segment is named twice")
    _need(all(one.fewest <= levels[-1] for one in segments), "fewest")
    return manifest


def _segment(name, items, fewest, sizes, checksums, deleted) -> Segment:
    _need(isinstance(name, str) and NAME.fullmatch(name), "the name of a segment")
    _need(isinstance(checksums, str) and DIGEST.fullmatch(checksums), "checksums")
    _need(_is_count(items) and _is_count(fewest), "items or fewest")
    _need(all(type(size) is int and size >= 0 for size in sizes.values()), "sizes")
    _need(all(type(row) is int and 0 <= row < items for row in deleted) and deleted == sorted(set(deleted)), "deleted")
    return Segment(name, items, fewest, dict(sizes), checksums, tuple(deleted))


def _is_count(number) -> bool:
    return type(number) is int and 0 < number < 2**31


def _need(holds, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _digest(index: dict) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__
