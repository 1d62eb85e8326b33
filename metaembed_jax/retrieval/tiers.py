"""Merge small segments, so that an index that follows its documents for years has few of them.

From first to last, each segment has at least twice the items of the next: N items have at most log2(N) + 1 segments, and an item is
copied O(log N) times. The order of items is kept.
"""

from collections.abc import Sequence
from pathlib import Path

from metaembed_jax.retrieval.manifest import Manifest, Segment
from metaembed_jax.retrieval.segment import SegmentFiles
from metaembed_jax.retrieval.writer import merge_segments


def tiers(kept: Sequence[SegmentFiles], new: Sequence[SegmentFiles]) -> list[list[SegmentFiles]]:
    """Return the segments that become one segment each. Segments without items are left out.

    Args:
      kept: segments of the index, in order.
      new: segments of one job, which are merged.
    """
    groups = []
    for group in (*([segment] for segment in kept), list(new)):
        if not _items(group):
            continue
        while groups and _items(groups[-1]) < 2 * _items(group):
            group = groups.pop() + group
        groups.append(group)
    return groups


def merge_tier(folder: Path, manifest: Manifest, group: Sequence[SegmentFiles]) -> tuple[Segment, ...]:
    """Write a group of segments as one segment; a single segment is written again only if over half of its items are deleted.

    Raises:
      UserError: a file is damaged.
    """
    first, *others = group
    if others or 2 * len(first.entry.deleted) > len(first):
        return merge_segments(folder, manifest, group)
    return (first.entry,)


def _items(group: Sequence[SegmentFiles]) -> int:
    return sum(len(segment) - len(segment.entry.deleted) for segment in group)
