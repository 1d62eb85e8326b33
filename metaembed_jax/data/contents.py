"""Digests of items, to find those with the same content, and of rows, to find those that changed."""

import hashlib

import numpy as np
from jaxtyping import Int
from PIL import Image

from metaembed_jax.batch.training import CONTENT_WORDS

DIGEST_BYTES, STAMP_BYTES = 16, 8


def content_digest(item: dict) -> bytes:
    """Return a digest of an item's text and image, encoded or composed."""
    text, image = item.get("text", "").encode(), item.get("image", b"")
    if isinstance(image, Image.Image):
        image = repr((image.mode, image.size)).encode() + image.tobytes()
    digest = hashlib.blake2b(len(text).to_bytes(8, "little") + text, digest_size=DIGEST_BYTES)
    digest.update(image)
    return digest.digest()


def stamp_of(value: object) -> str:
    """Return 16 hexadecimal digits of a value: numbers, texts, bytes, None, and lists and dicts of them."""
    digest = hashlib.blake2b(digest_size=STAMP_BYTES)
    _update(digest, value)
    return digest.hexdigest()


def _update(digest, value: object) -> None:
    if isinstance(value, bytes):
        digest.update(b"b%d:" % len(value) + value)
    elif isinstance(value, dict):
        _update(digest, sorted(value.items()))
    elif isinstance(value, list | tuple):
        digest.update(b"l%d:" % len(value))
        for entry in value:
            _update(digest, entry)
    else:
        digest.update(f"{value!r};".encode())  # repr escapes what UTF-8 cannot encode


def content_words(item: dict) -> Int[np.ndarray, "W"]:
    """Return the first words of an item's digest, for a `TrainingBatch`."""
    return np.frombuffer(content_digest(item), np.int32, CONTENT_WORDS)
