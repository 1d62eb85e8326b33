"""Digests of items, to find those with the same content."""

import hashlib

import numpy as np
from jaxtyping import Int
from PIL import Image

from metaembed_jax.batch.training import DIGEST_WORDS

DIGEST_BYTES = 16


def content_digest(item: dict) -> bytes:
    """Return a digest of an item's text and image, encoded or composed."""
    text, image = item.get("text", "").encode(), item.get("image", b"")
    if isinstance(image, Image.Image):
        image = repr((image.mode, image.size)).encode() + image.tobytes()
    digest = hashlib.blake2b(len(text).to_bytes(8, "little") + text, digest_size=DIGEST_BYTES)
    digest.update(image)
    return digest.digest()


def digest_words(item: dict) -> Int[np.ndarray, "W"]:
    """Return the first words of an item's digest, for a `TrainingBatch`."""
    return np.frombuffer(content_digest(item), np.int32, DIGEST_WORDS)
