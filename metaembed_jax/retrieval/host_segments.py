"""Segments that several hosts write in one folder. Their entries are exchanged as text; no vectors are."""

import dataclasses
from collections.abc import Mapping

from metaembed_jax import hosts
from metaembed_jax.errors import UserError
from metaembed_jax.retrieval.manifest import Segment, as_segment


def gather_segments(segments: Mapping[int, Segment]) -> dict[int, Segment]:
    """Return the segments that all hosts have written, by their numbers."""
    entries = hosts.gather_dicts({number: dataclasses.asdict(segment) for number, segment in segments.items()})
    return {int(number): as_segment(**fields) for number, fields in entries.items()}


def check_equal(value: str, name: str) -> None:
    """Check that a value is the same on all hosts.

    Raises:
      UserError: it is not; names a host.
    """
    first, *others = hosts.gather_texts(value)
    for host, other in enumerate(others, 1):
        if other != first:
            raise UserError(
                f"{name} of host {host}: expected those of the first host; start the same command on every host, on the same files"
            )
