"""One host of `test_encoder`, which encodes items together with another."""

import argparse
import json
from pathlib import Path

import numpy as np

from metaembed_jax.hosts.connect import connect_hosts
from metaembed_jax.mesh import make_mesh
from metaembed_jax.startup import add_host_flags
from tests.encoding.digits import digit_encoder

parser = argparse.ArgumentParser()
parser.add_argument("--items", type=Path)
parser.add_argument("--out", type=Path)
add_host_flags(parser)
flags = parser.parse_args()
connect_hosts(flags.coordinator, flags.hosts, flags.host)
items = json.loads(flags.items.read_text())
items = [item | {"image": tuple(item["image"])} if isinstance(item, dict) and "image" in item else item for item in items]
encoder = digit_encoder(make_mesh(2, 2, 2))
blocks = list(encoder.blocks({}, items, "query", 3, size=100, allow_failures=True))
numbers, vectors = (np.concatenate([getattr(block, name) for block in blocks]) for name in ("numbers", "vectors"))
np.savez(flags.out / f"{flags.host}.npz", numbers=numbers, vectors=vectors)
failures = {number: reason for block in blocks for number, reason in block.failures.items()}
(flags.out / f"{flags.host}.json").write_text(json.dumps(failures))
