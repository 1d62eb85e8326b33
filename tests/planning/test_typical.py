"""Rows of the recipe's mixture, planned from typical items."""

import numpy as np
import pytest

from metaembed_jax.backbones.qwen.images import smart_resize
from metaembed_jax.batch.items import Size
from metaembed_jax.batch.packing import pack
from metaembed_jax.config import load_config
from metaembed_jax.data.source_schedule import balanced_schedule
from metaembed_jax.planning.typical_items import typical_document, typical_pair
from metaembed_jax.planning.typical_rows import rows_of_steps, typical_steps

ROW = Size(2560, 8192, 512)
WORDS_OF_PROMPT = {"query": 6 + 12 + 16, "document": 6 + 80}  # frame, suffix, Meta Tokens


@pytest.fixture(scope="module")
def recipe():
    return load_config("configs/7b.py")


def size(item, side):
    """The size for Qwen2.5-VL: units of 28 pixels, patches padded by about a tenth of the windows at the edges."""
    tokens, vectors = len(item["text"].split()) + WORDS_OF_PROMPT[side], 16 if side == "query" else 64
    if item["image"] is None:
        return Size(tokens, 0, vectors)
    width, height = item["image"]
    rows, columns = (length // 28 for length in smart_resize(height, width, 28, 56 * 56, 1024 * 28 * 28))
    edges = rows * columns - (rows // 4) * (columns // 4) * 16
    return Size(tokens + rows * columns, 4 * rows * columns + -(-edges * 4 // 64) * 64 - edges * 4, vectors)


def test_rows_of_the_recipe_are_filled(recipe):
    steps = list(typical_steps(recipe, size, 4))
    rows = rows_of_steps(steps, ROW)
    assert [len(sizes_N3) for sizes_N3 in steps] == [recipe.rows.batch_size * 3] * 4
    assert max(rows.fill) >= 0.95 and rows.fill.tokens > 0.9 and rows.fill.patches > 0.9
    assert rows.vectors <= ROW.vectors
    assert rows.largest <= 1.06 * rows.mean
    assert rows.largest == max(pack(sizes_N3, ROW)[:, 0].max() + 1 for sizes_N3 in steps)
    for again, sizes_N3 in zip(typical_steps(recipe, size, 2), steps, strict=False):
        np.testing.assert_array_equal(again, sizes_N3)


def test_items_are_those_of_their_source(recipe):
    rng = np.random.default_rng(0)
    for name, *_ in recipe.data.sources:
        query, document = typical_pair(name, rng)
        assert (document["image"] is None) == (typical_document(name, rng)["image"] is None)
        assert all(item["text"] or item["image"] for item in (query, document))
    shared = {"MSCOCO_i2t": (True, False), "MSCOCO_t2i": (False, True), "colpali": (False, True), "CIRR": (True, True)}
    for name, images in shared.items():
        assert tuple(item["image"] is not None for item in typical_pair(name, rng)) == images
    pages = [typical_pair("DocVQA", rng)[0]["image"] for _ in range(50)]
    assert sum(height > width for width, height in pages) > 35


def test_a_balanced_schedule_keeps_weights_and_sizes():
    weights = [5.0, 2.0, 1.0, 1.0, 0.5]
    sizes_S2 = np.array([(700, 2600), (240, 670), (160, 340), (930, 3400), (400, 1340)])
    chosen = balanced_schedule(weights, sizes_S2, 12, 300)
    np.testing.assert_array_equal(balanced_schedule(weights, sizes_S2, 12, 100), chosen[:100])
    counts_S = np.bincount(chosen.ravel(), minlength=5)
    np.testing.assert_allclose(counts_S, np.array(weights) / sum(weights) * chosen.size, atol=3)
    totals = sizes_S2[chosen].sum(axis=1)
    assert (totals.max(axis=0) <= 1.1 * totals.mean(axis=0)).all()
    by_weight_alone = balanced_schedule(weights, np.ones((5, 2), int), 12, 300)
    assert (sizes_S2[by_weight_alone].sum(axis=1).max(axis=0) > 1.1 * totals.mean(axis=0)).all()
