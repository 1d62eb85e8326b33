"""Segments that several hosts write in one folder. Their entries are exchanged as text; no vectors are."""

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path

from metaembed_jax import hosts
from metaembed_jax.errors import UserError
from metaembed_jax.files import PART
from metaembed_jax.retrieval.manifest import Segment, as_segment
from metaembed_jax.retrieval.store import DRAFT

SHARED_SECONDS = 30  # until a host sees a file that another has written, on a network's file system


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


def check_shared(folder: Path) -> None:
    """Check that all hosts see the folder of the first, which writes a file there and removes it.

    Raises:
      UserError: the folder is not shared; names a host.
    """
    if hosts.count_hosts() == 1:
        return
    file = folder / f".{DRAFT}.{hosts.from_first(os.urandom(8).hex())}{PART}"  # `store.clean` removes it after a crash
    if hosts.is_first():
        file.touch()
    hosts.wait_for_all("shared")
    deadline = time.monotonic() + SHARED_SECONDS
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = hosts.gather_texts("seen" if file.exists() else "")
    if hosts.is_first():
        file.unlink()
    if "" in seen:
        host = seen.index("")
        raise UserError(f"{folder}: host {host} does not see the files of the first host; expected a folder that all hosts share")
