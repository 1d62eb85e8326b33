"""The command `index` on one host, with rows small enough for a CPU and parts of 64 documents a device.

The last line on stderr has the peak of the resident memory after the model was loaded, and what was resident then, in KiB.
"""

import sys
from pathlib import Path

import metaembed_jax as me
from metaembed_jax import cli
from metaembed_jax.flags import run_main
from metaembed_jax.retrieval import parts
from tests.encoding.small_rows import with_small_rows

load, resident = me.MetaEmbed.from_pretrained, []


def status(key):
    """Return a figure of this process, in KiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0])


def load_small(name, **options):
    """Load a model with small rows, and begin to measure the peak of the memory."""
    model = with_small_rows(load(name, dtype="float32", **options))
    Path("/proc/self/clear_refs").write_text("5")
    resident.append(status("VmRSS"))
    return model


me.MetaEmbed.from_pretrained = load_small
parts.PART_DOCUMENTS = 64
try:
    run_main(lambda arguments: cli.main(["index", *arguments]))
finally:
    if resident:
        print(f"memory {status('VmHWM')} {resident[0]}", file=sys.stderr, flush=True)
