"""A model without a network, for tests of what is encoded and when. The vectors of an item are seeded by its content."""

import hashlib
import types

import jax
import numpy as np

import metaembed_jax as me
from metaembed_jax.encoding.blocks import EncodedBlock
from metaembed_jax.hosts.shares import share
from metaembed_jax.mesh import make_mesh
from tests.retrieval.reference import unit

WIDTH, VECTORS = 8, 4


class FakeModel(me.MetaEmbed):
    """A model that lists the content of each item that it has encoded, in `encoded`. Hosts take turns."""

    fingerprint, dimension = "f" * 16, WIDTH

    def __init__(self, fingerprint="f" * 16, mesh=None):
        self.fingerprint, self.encoded = fingerprint, []
        self.mesh = mesh or make_mesh(devices=jax.devices()[:1])
        self.config = types.SimpleNamespace(vectors=lambda side: VECTORS, reads_states=False)
        self.processor = types.SimpleNamespace(fingerprint="images of 1024 tokens")

    def encode_blocks(self, items, side, *, budget, size, start=0, bar=None, allow_failures=False):
        assert allow_failures
        for first in range(start, len(items), size):
            numbers, contents, failures = range(first, min(first + size, len(items))), {}, {}
            for number in numbers:
                try:
                    contents[number] = content(items[number])
                except me.UserError as error:
                    failures[number] = str(error)
            contents = dict(share([*contents.items()]))
            self.encoded += contents.values()
            bar.update(len(numbers))
            vectors_nRD = np.array([vectors(key)[:budget] for key in contents.values()]).reshape(-1, budget, WIDTH)
            yield EncodedBlock(numbers, np.array([*contents], int), vectors_nRD.astype(np.float32), failures)

    def count(self):
        """Return the number of items that were encoded since the last call."""
        count = len(self.encoded)
        self.encoded.clear()
        return count


def content(item):
    """Return a hash of the text and the pixels of an item."""
    image = item.get("image", b"")
    pixels = image if isinstance(image, bytes) else image.tobytes()
    return hashlib.sha256(item.get("text", "").encode() + b"|" + pixels).hexdigest()[:16]


def vectors(key):
    """Return the vectors of an item."""
    return unit(np.random.default_rng(int(key, 16)), VECTORS, WIDTH)
