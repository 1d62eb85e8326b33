"""Merge small segments, so that an index that follows its documents for years has few of them.

New items become one segment, which absorbs the segments before it that have less than twice its items. So an index of N items has
O(log N) segments, and an item is copied O(log N) times. On one host, the order of items is kept.

Several hosts divide the new segment: each writes a share of its items.
"""

from collections.abc import Sequence
from pathlib import Path

from metaembed_jax.hosts.shares import share
from metaembed_jax.retrieval.host_segments import gather_segments
from metaembed_jax.retrieval.manifest import Manifest, Segment
from metaembed_jax.retrieval.segment import SegmentFiles
from metaembed_jax.retrieval.writer import merge_segments


def tiers(kept: Sequence[Segment], new: Sequence[Segment], shares: int = 1) -> list[list[Segment]]:
    """Return groups of segments that become one segment each, in order. Segments without items are left out.

    Args:
      kept: segments of the index.
      new: segments of one job.
      shares: number of segments that the new items become.
    """
    kept, group = list(filter(count_items, kept)), list(filter(count_items, new))
    while group and kept and count_items(kept[-1]) < 2 * sum(map(count_items, group)):
        group.insert(0, kept.pop())
    return [[segment] for segment in kept] + list(filter(None, divide(group, shares)))


def divide(segments: Sequence[Segment], shares: int) -> list[list[Segment]]:
    """Deal segments to shares in turns. A share is empty if there are fewer segments than shares."""
    return [list(segments[first::shares]) for first in range(shares)]


def merge_tiers(folder: Path, manifest: Manifest, groups: Sequence[Sequence[Segment]]) -> tuple[Segment, ...]:
    """Write each group as one segment, and return all of them. Each host writes some groups.

    A single segment is written again only if over half of its items are deleted.

    Raises:
      UserError: a file is damaged.
    """
    rewritten = [number for number, group in enumerate(groups) if len(group) > 1 or 2 * len(group[0].deleted) > group[0].items]
    merged = {}
    for number in share(rewritten):
        opened = (SegmentFiles(folder, manifest, segment) for segment in groups[number])
        (merged[number],) = merge_segments(folder, manifest, opened)
    merged = gather_segments(merged)
    return tuple(merged.get(number, group[0]) for number, group in enumerate(groups))


def count_items(segment: Segment) -> int:
    """Return the number of items that are not deleted."""
    return segment.items - len(segment.deleted)
