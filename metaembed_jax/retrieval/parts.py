"""Encode documents in parts. Each part is on the disk before the next is encoded, so a killed job loses at most one."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from metaembed_jax import hosts
from metaembed_jax.data.document_sequence import Documents
from metaembed_jax.data.left_out import LeftOut, check_left_out
from metaembed_jax.encoding.blocks import EncodedBlock
from metaembed_jax.late_interaction.pooling import count_vectors
from metaembed_jax.model import MetaEmbed
from metaembed_jax.retrieval import store
from metaembed_jax.retrieval.following import Plan
from metaembed_jax.retrieval.host_segments import gather_segments
from metaembed_jax.retrieval.ingest import make_items
from metaembed_jax.retrieval.manifest import Manifest, Segment
from metaembed_jax.retrieval.tiers import count_items, divide, merge_tiers
from metaembed_jax.retrieval.writer import SegmentWriter
from metaembed_jax.sharding import batch_shards

PART_DOCUMENTS = 256  # of a device
SIMILAR_PARTS = 64  # that a host writes before it merges them: each has a dozen files, and the draft names them all


class Selected(Sequence):
    """Some documents, for the encoder.

    Args:
      documents: all documents.
      numbers: the numbers of those that are selected.
    """

    def __init__(self, documents: Documents, numbers: Sequence[int]):
        self._documents, self._numbers = documents, numbers
        if describe := getattr(documents, "describe", None):  # without it, the encoder reads an item once
            self.describe = lambda number: describe(self._numbers[number])

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number):
        return self._documents[self._numbers[number]]

    def drawn_at(self, pixels: int) -> "Selected":
        """Return the same documents with pages of PDF files drawn at about so many pixels."""
        return Selected(self._documents.drawn_at(pixels), self._numbers)

    def item_name(self, number: int) -> str:
        """Return the name of a document in errors."""
        return self._documents.item_name(self._numbers[number])


def encode_parts(
    model: MetaEmbed,
    documents: Documents,
    plan: Plan,
    folder: Path,
    skip: int,
    progress: bool,
) -> Manifest:
    """Encode the pending documents, and return the draft with the segments of their parts, and with those that cannot be read.

    All hosts call this. Each writes the vectors of its share of a part, and the first writes the draft.

    Args:
      folder: the folder of the index.
      skip: most documents that may be left out.

    Raises:
      UserError: more documents than `skip` cannot be read. The draft in the folder has all that were encoded before.
    """
    draft, size, count = plan.draft, PART_DOCUMENTS * batch_shards(model.mesh), len(documents)
    items, silent = Selected(documents, plan.pending.tolist()), not (progress and hosts.is_first())
    with tqdm(total=count, initial=count - len(items), desc="indexing", unit="item", disable=silent) as bar:
        blocks = model.encode_blocks(items, "document", budget=draft.levels[-1], size=size, bar=bar, allow_failures=True)
        for block in blocks:
            failed = [(int(plan.pending[number]), reason) for number, reason in sorted(block.failures.items())]
            left_out = [(documents.id_of(number), reason, int(plan.stamps[number])) for number, reason in failed]
            segments = _write(folder, documents, plan, block)
            draft = dataclasses.replace(draft, segments=draft.segments + segments, left_out=(*draft.left_out, *left_out))
            if hosts.is_first():
                store.write_draft(folder, draft)
            draft = _merge_parts(folder, draft)
            check_left_out([*documents.left_out, *(LeftOut(item, reason) for item, reason, _ in draft.left_out)], skip)
    return draft


def _write(folder: Path, documents: Documents, plan: Plan, block: EncodedBlock) -> tuple[Segment, ...]:
    """Write this host's documents of a part as a segment, and return the segments of all hosts."""
    segments, numbers = {}, plan.pending[block.numbers]
    if len(numbers):
        descriptions = [documents.metadata(number) for number in numbers.tolist()]
        ids = [description["id"] for description in descriptions]
        writer = SegmentWriter(folder, plan.draft)
        vectors = block.vectors
        if not vectors[:, -1].any(axis=1).all():  # a model that reads all states gives some items fewer vectors
            vectors = [vectors_RD[:count] for vectors_RD, count in zip(vectors, count_vectors(vectors), strict=True)]
        items = make_items(vectors, ids, [_metadata(description) for description in descriptions], None)
        writer.add(items, plan.stamps[numbers])
        segments[jax.process_index()] = writer.close()
    return tuple(segment for _, segment in sorted(gather_segments(segments).items()))


def _merge_parts(folder: Path, draft: Manifest) -> Manifest:
    """Merge the last segments of a draft while there are many of similar size, and return the draft that is in the folder."""
    while True:
        segments = [*filter(count_items, draft.segments)]
        limit = 2 * max((segment.items for segment in segments[-hosts.count_hosts() :]), default=0)
        similar = [*itertools.takewhile(lambda segment, limit=limit: segment.items <= limit, reversed(segments))][::-1]
        if len(similar) < SIMILAR_PARTS * hosts.count_hosts():
            return draft
        merged = merge_tiers(folder, draft, divide(similar, hosts.count_hosts()))
        draft = dataclasses.replace(draft, segments=(*segments[: -len(similar)], *merged))
        if hosts.is_first():
            store.write_draft(folder, draft)
            store.remove(folder, similar)


def _metadata(description: dict) -> dict:
    return {key: value for key, value in description.items() if key != "id" and value is not None}
