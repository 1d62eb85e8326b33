"""Encoding of images and texts of which some are broken, with a small model."""

import io

import jax
import numpy as np
import pytest

import metaembed_jax as me
from metaembed_jax.mesh import make_mesh
from tests.backbones.qwen2_5_vl.reference import noise
from tests.checkpoints.huggingface_files import random_tensors, write
from tests.encoding.small_rows import with_small_rows

SIZES = [(60, 90), (33, 40), (120, 56), (90, 61), (28, 28)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = write(tmp_path_factory.mktemp("huggingface"), random_tensors())
    return with_small_rows(me.MetaEmbed.from_pretrained(directory, dtype="float32", mesh=make_mesh(devices=jax.devices()[:1])))


def jpeg(size, seed):
    buffer = io.BytesIO()
    noise(*size, seed).save(buffer, "JPEG")
    return buffer.getvalue()


def encode(model, items, **options):
    """Return the only block of items, of which some may fail."""
    (block,) = model.encode_blocks(items, "document", budget=4, allow_failures=True, **options)
    return block


def test_broken_items_change_no_bit_of_others(model):
    whole = [{"image": jpeg(SIZES[n % 5], n)} if n % 3 else f"text {n}" for n in range(24)]
    torn = {n: {"image": whole[n]["image"][:-200]} for n in (1, 4, 5, 23)}  # after its header; of four sizes
    unreadable = {0: {}, 11: {"image": b"no image"}, 12: 7, 13: {"image": b""}, 22: {"image": jpeg((5, 5), 0)[:30]}}
    broken = [(torn | unreadable).get(n, item) for n, item in enumerate(whole)]
    block = encode(model, broken)
    assert list(block.failures) == sorted(torn | unreadable)
    assert all(f"item {n}" in reason and len(reason.splitlines()) == 1 for n, reason in block.failures.items())
    good = block.numbers.tolist()
    assert good == [n for n in range(24) if n not in torn | unreadable]
    # An item that fails when it is decoded leaves a slot of its size.
    intact = encode(model, [item for n, item in enumerate(whole) if n not in unreadable])
    slots = [slot for slot, n in enumerate(n for n in range(24) if n not in unreadable) if n not in torn]
    np.testing.assert_array_equal(block.vectors, intact.vectors[slots])
    # Without any, rows are others.
    np.testing.assert_allclose(block.vectors, model.encode_document([whole[n] for n in good], budget=4), atol=2e-6)
    # An item whose size cannot be read leaves nothing.
    alone = encode(model, [broken[n] for n in range(24) if n not in unreadable])
    np.testing.assert_array_equal(block.vectors, alone.vectors)


def test_blocks_have_the_same_bits_alone(model):
    items = [{"image": jpeg(SIZES[n % 5], n)} if n % 3 else f"text {n}" for n in range(21)]
    items[10] = {"image": items[10]["image"][:200]}
    blocks = list(model.encode_blocks(items, "document", budget=4, size=8, allow_failures=True))
    for block, numbers in zip(blocks, (range(8), range(8, 16), range(16, 21)), strict=True):
        (alone,) = model.encode_blocks(
            items[: numbers.stop], "document", budget=4, size=8, start=numbers.start, allow_failures=True
        )
        assert block.items == alone.items == numbers and block.failures == alone.failures
        np.testing.assert_array_equal(block.vectors, alone.vectors)
    assert [list(block.failures) for block in blocks] == [[], [10], []]
    with pytest.raises(me.UserError, match="item 10"):
        list(model.encode_blocks(items, "document", budget=4, size=8))
