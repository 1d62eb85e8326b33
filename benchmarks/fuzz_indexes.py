"""Indexes whose manifest or files are damaged, also with checksums that match."""

import functools
import hashlib
import json
import random
import shutil
import tempfile
import zlib
from pathlib import Path

import numpy as np
from fuzz_kinds import EXTREMES, damage

from metaembed_jax import Index
from metaembed_jax.errors import UserError
from metaembed_jax.retrieval.checksummed_files import CHUNK_BYTES

VALUES: tuple = (None, 0, -1, 1, 2, 3.5, 2**31, 2**40, 10**30, True, "", "x")
VALUES += ("../x", [], [0], [5, 3], {}, {"a": 1}, "float32", "int8")
ITEMS, VECTORS, WIDTH = 12, 4, 8
WHERES: tuple = ({"path": {"$gte": "/x/3"}, "page": {"$ne": 7}}, {"$or": [{"new": True}, {"page": {"$lt": 2.5}}, {"large": 1.0}]})
TYPES = (("bfloat16", None), ("float32", None), ("int8", None), ("int8", "float32"))


def _vectors(seed: int, count: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, VECTORS, WIDTH)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@functools.cache
def _base(dtype: str, exact: str | None) -> tuple[Path, list]:
    """Return the folder of an index of three segments, one with deleted items, and what it answers."""
    folder = Path(tempfile.mkdtemp()) / dtype
    metadata = [
        {"path": f"/x/{number}", "page": number - 0.5 * (number % 2), "new": number > 3, "large": 2**64, "é": [1, {"a": None}]}
        for number in range(ITEMS)
    ]
    index = Index.build(
        _vectors(0, ITEMS), [f"é{n}" for n in range(ITEMS)], metadata=metadata, dtype=dtype, exact=exact, path=folder
    )
    index.add(_vectors(1, 5), [f"new {n}" for n in range(5)])
    index.delete(["é3", "new 2"])
    return folder, _answers(index, bool(exact))


def make_index(random: random.Random, folder: Path) -> tuple[tuple[str, str | None], bool]:
    """Write an index with one or two changes; return its types, and whether checksums were made to match."""
    types, is_signed = random.choice(TYPES), random.random() < 0.7
    shutil.copytree(_base(*types)[0], folder / "index")
    for _ in range(random.choice((0, 1, 1, 2))):
        if random.random() < 0.6:
            _change_manifest(random, folder / "index", is_signed)
        else:
            _change_file(random, folder / "index", is_signed)
    return types, is_signed


def check_index(folder: Path, content: tuple[tuple[str, str | None], bool]) -> str | None:
    """Use every part of the index; without matching checksums, its answers are those of the whole one or it is refused."""
    types, is_signed = content
    index = Index.load(folder / "index")
    answers, reasons = [], []
    try:
        answers = _answers(index, bool(types[1]))
    except UserError as error:
        reasons.append(str(error))
    if answers and not is_signed:
        assert answers == _base(*types)[1], "other answers than before the damage"
    for change in (index.verify, lambda: index.add(_vectors(2, 2), ["a", "b"]), lambda: index.delete(["new 1"]), index.compact):
        try:
            change()
        except UserError as error:
            reasons.append(str(error))
    return reasons[0] if reasons else None


def _answers(index: Index, certifies: bool) -> list:
    """Return what an index answers to two queries, at two budgets, with filters, and by its exact vectors."""
    answers: list = [len(index), index.vectors, index.model, list(index.left_out)]
    for budget in (None, [(1, 1, 4), (2, 2)]):
        scores, ids = index.search(_vectors(3, 2)[:, :2], budget=budget)
        answers += [scores.tolist(), ids.tolist(), [index.metadata(item) for item in ids[0]]]
    for where in WHERES:
        hits = index.search(_vectors(3, 2)[:, :2], where=where)
        answers += [hits.scores.tolist(), hits.ids.tolist(), hits.metadata(0)]
    if certifies:
        hits = index.search(_vectors(3, 2)[:, :2], certified=True)
        answers += [hits.scores.tolist(), hits.ids.tolist()]
    return answers


def _change_manifest(random: random.Random, folder: Path, is_signed: bool) -> None:
    file = folder / "manifest.json"
    if not is_signed or random.random() < 0.1:
        file.write_bytes(damage(random, file.read_bytes()))
        return
    try:
        stored = json.loads(file.read_bytes())
        node = stored["index"]
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = random.choice(keys)
            if not isinstance(node[key], dict | list) or not node[key] or random.random() < 0.1:
                break
            node = node[key]
    except (ValueError, TypeError, KeyError):  # damaged before
        return
    if random.random() < 0.2:
        del node[key]
    elif type(node[key]) is int and random.random() < 0.7:
        node[key] = random.choice((node[key] + 1, node[key] - 1, *EXTREMES))
    else:
        node[key] = random.choice(VALUES)
    _sign(file, stored)


def _change_file(random: random.Random, folder: Path, is_signed: bool) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json")
    file = random.choice(files)
    way = random.random()
    data = damage(random, file.read_bytes())
    if way < 0.05:
        file.unlink()
        return
    if way < 0.1:
        file.unlink()
        file.symlink_to("/etc/passwd")
        return
    if is_signed and way < 0.8:  # the same size, so that the content is read
        data = (data + bytes(10**5))[: file.stat().st_size]
    file.write_bytes(data)
    if is_signed and file.name != "checksums" and file.parent != folder:
        _sign_segment(file)


def _sign_segment(changed: Path) -> None:
    """Write the checksums of a segment, and its sizes into the manifest."""
    files = sorted(file for file in changed.parent.iterdir() if file.name != "checksums")
    contents = {file.name: file.read_bytes() for file in files if not file.is_symlink()}
    starts = {name: range(0, len(content), CHUNK_BYTES) for name, content in contents.items()}
    sums = [zlib.crc32(contents[name][start : start + CHUNK_BYTES]) for name in sorted(contents) for start in starts[name]]
    checksums = np.array(sums, np.uint32).tobytes()
    (changed.parent / "checksums").write_bytes(checksums)
    manifest = changed.parents[1] / "manifest.json"
    try:
        stored = json.loads(manifest.read_bytes())
        for segment in stored["index"]["segments"]:
            if segment["name"] == changed.parent.name:
                segment["checksums"] = hashlib.sha256(checksums).hexdigest()
                segment["sizes"] = segment["sizes"] | {name: len(content) for name, content in contents.items()}
    except (ValueError, TypeError, KeyError):  # damaged before
        return
    _sign(manifest, stored)


def _sign(manifest: Path, stored: dict) -> None:
    stored["sha256"] = hashlib.sha256(json.dumps(stored["index"], sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps(stored))
