"""Indexes that follow their documents: what is new or changed is encoded, what is gone is dropped, and all else is kept."""

import contextlib
import dataclasses
import os
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt64
from tqdm import tqdm

from metaembed_jax import hosts
from metaembed_jax.data.document_sequence import Documents
from metaembed_jax.data.left_out import check_left_out
from metaembed_jax.errors import UserError, printable
from metaembed_jax.files import digest, local_path
from metaembed_jax.hosts.shares import share
from metaembed_jax.model import MetaEmbed
from metaembed_jax.retrieval import store
from metaembed_jax.retrieval.following import Match, Plan, find_damage, match
from metaembed_jax.retrieval.host_segments import check_equal
from metaembed_jax.retrieval.index import Index
from metaembed_jax.retrieval.ingest import hashes
from metaembed_jax.retrieval.manifest import Manifest, Segment, check_types, levels_of
from metaembed_jax.retrieval.parts import encode_parts
from metaembed_jax.retrieval.tiers import merge_tiers, tiers

CALIBRATED_CHANGE = 0.1  # of the number of items, after which a line asks for a new calibration


def index_documents(
    model: MetaEmbed,
    documents: Documents,
    path: str | os.PathLike,
    *,
    name: str = "",
    budget: int | None = None,
    dtype: str = "bfloat16",
    exact: str | None = None,
    skip: int = 0,
    progress: bool = False,
) -> Index:
    """Index documents in a folder, or let the index in it follow them.

    Documents that are new or changed are encoded; items of documents that are gone, and items added by hand, are dropped. A killed
    job resumes when it is called again. An index of another model, budget, type or size of images is replaced when the new one is
    complete. An item has the metadata of its document, without nulls, and with an absolute path. `Index.left_out` lists the
    documents that cannot be read; the next job tries them again. All hosts write, in a folder that they share, and the first one
    commits.

    Args:
      documents: from `open_documents`.
      path: the folder of the index.
      name: the path or hub id of the model, for later searches.
      budget: vectors of each document to keep; all by default.
      dtype: type of the vectors on disk, as for `Index.build`.
      exact: type of the exact vectors of an index of int8, as for `Index.build`.
      skip: most documents that may be left out because they cannot be read. The job stops at more, and keeps what it has encoded.
      progress: show a bar, and print how many items were encoded, kept and dropped, and which documents were left out.

    Raises:
      UserError: more documents than `skip` cannot be read, the budget is larger than the model's, the folder holds something else,
        another process is writing to it, or a host does not see it.
    """
    check_types(dtype, exact)
    folder, limit = local_path(path), model.config.vectors("document")
    budget = limit if budget is None else budget
    if type(budget) is not int or not 1 <= budget <= limit:
        raise UserError(f"budget={budget!r}: expected 1 to {limit} document vectors, which this model has")
    origin = {"name": name, "fingerprint": model.fingerprint}
    settings = digest(repr((model.fingerprint, model.processor.fingerprint, budget, dtype, exact)).encode())
    check_equal(f"{settings} {skip}", "the model, budget, types or skip")
    check_left_out(documents.left_out, skip)
    if not len(documents):
        raise UserError("nothing to index: expected at least one document")
    empty = Manifest(model.dimension, levels_of(budget), dtype, exact=exact, model=origin, settings=settings)
    with store.writing(folder) if hosts.is_first() else contextlib.nullcontext():
        store.check_shared(folder)
        plan = _plan(folder, documents, empty, skip)
        draft = encode_parts(model, documents, plan, folder, skip, progress)
        is_changed = _commit(folder, documents, empty, plan.committed, draft)
        hosts.wait_for_all("indexed")
    index = Index(folder)
    if progress and hosts.is_first():
        print(f"{path}: {_summary(index, plan.matched, is_changed)}", flush=True)
    return index


def _plan(folder: Path, documents: Documents, empty: Manifest, skip: int) -> Plan:
    """Find the documents that are stored. Files of other unfinished jobs are removed."""
    stored, draft = hosts.first_then_others(lambda: _read_committed(folder, empty))
    segments = (*stored, *draft.segments)
    damage = _damaged_names(folder, empty, segments)
    sound = [segment for segment in segments if segment.name not in damage]
    ids_N, stamps_N = hashes(documents.ids()), documents.stamps()
    check_equal(digest(ids_N.tobytes() + stamps_N.tobytes()), "the documents")
    matched = match(ids_N, stamps_N, folder, empty, sound)
    is_tried_N, left_out = _left_out_before(draft, ids_N, stamps_N)
    if len(documents.left_out) + len(left_out) > skip:  # the job has stopped at them: they may be readable by now
        is_tried_N, left_out = np.zeros(len(ids_N), bool), ()
    drafted = {segment.name for segment in draft.segments}
    committed = [segment for segment in matched.segments if segment.name not in drafted]
    parts = tuple(segment for segment in matched.segments if segment.name in drafted)
    draft = dataclasses.replace(empty, segments=parts, left_out=left_out)
    return Plan(committed, draft, matched, stamps_N, np.flatnonzero(~matched.is_kept_N & ~is_tried_N))


def _read_committed(folder: Path, empty: Manifest) -> tuple[tuple[Segment, ...], Manifest]:
    """Return the segments of the index that the job can keep, and its draft. The first host removes files of other jobs."""
    manifest, draft = store.read_manifests(folder)
    draft = draft if draft and draft.settings == empty.settings else empty
    if hosts.is_first():
        store.clean(folder, manifest, draft)
    committed = manifest.segments if manifest and manifest.settings == empty.settings else ()
    names = {segment.name for segment in committed}  # a job that was killed after its commit may have left its draft
    return committed, dataclasses.replace(draft, segments=tuple(segment for segment in draft.segments if segment.name not in names))


def _damaged_names(folder: Path, empty: Manifest, segments: tuple[Segment, ...]) -> set[str]:
    """Return the names of damaged segments; each host checks some, and the first prints what is wrong."""
    damage = hosts.gather_dicts(find_damage(folder, empty, share(segments)))
    if damage and hosts.is_first():
        items = sum(segment.items - len(segment.deleted) for segment in segments if segment.name in damage)
        tqdm.write(f"{next(iter(damage.values()))}\n{folder}: {items:,} items are damaged; their documents are encoded again")
    return {*damage}


def _left_out_before(
    draft: Manifest, ids_N: UInt64[np.ndarray, " N"], stamps_N: UInt64[np.ndarray, " N"]
) -> tuple[Bool[np.ndarray, " N"], tuple[tuple[str, str, int], ...]]:
    """Return a mask of the documents that a draft leaves out and that have not changed since, and their entries."""
    is_tried_N, entries = np.zeros(len(ids_N), bool), []
    for item, reason, stamp in draft.left_out:
        is_same_N = (ids_N == hashes([item])) & (stamps_N == np.uint64(stamp))
        entries += [(item, reason, stamp)] if is_same_N.any() else []
        is_tried_N |= is_same_N
    return is_tried_N, tuple(entries)


def _commit(folder: Path, documents: Documents, empty: Manifest, committed: list[Segment], draft: Manifest) -> bool:
    """Merge small segments, and replace the index, which keeps its calibrations. Returns False if it is the same as before.

    Raises:
      UserError: no document could be read.
    """
    groups = tiers(committed, draft.segments, hosts.count_hosts())
    if not groups:
        raise UserError(f"nothing to index: none of {len(documents):,} documents can be read")
    segments = merge_tiers(folder, empty, groups)
    left_out = (*((*document, 0) for document in documents.left_out), *draft.left_out)
    index = dataclasses.replace(empty, segments=segments, left_out=left_out)
    if not hosts.is_first():
        return True
    before, _ = store.read_manifests(folder)
    if before and before.settings == empty.settings:
        index = dataclasses.replace(index, calibrations=before.calibrations)
    return store.commit(folder, index)


def _summary(index: Index, matched: Match, is_changed: bool) -> str:
    kept, count = int(matched.is_kept_N.sum()), len(index.left_out)
    counts = f"{len(index) - kept:,} encoded, {kept:,} kept, {matched.dropped:,} dropped" + f", {count:,} left out" * bool(count)
    lines = [f"  left out {printable(item)}: {printable(reason)}" for item, reason in index.left_out]
    items = f"{len(index):,} items ({counts})" if is_changed else f"{len(index):,} items, nothing new, changed or gone"
    if any(abs(len(index) - calibration.items) > CALIBRATED_CHANGE * calibration.items for calibration in index.calibrations):
        lines.append(f"  it was calibrated on {index.calibrations[-1].items:,} items; run `metaembed calibrate` again")
    return "\n".join([f"{items}, {index.vectors} vectors each.", *lines])
