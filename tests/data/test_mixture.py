"""Which sources a step draws from: by weight, and never more rows of a kind than a step has."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from scipy import stats

from metaembed_jax.config import load_config
from metaembed_jax.data.mixture import mixture, rows_needed, schedule
from metaembed_jax.data.slots import slots
from metaembed_jax.errors import UserError


class Source(list):
    """Rows of numbers, with what its marker would say."""

    def __init__(self, rows, queries=("text",), positives=("image",), negatives=0):
        super().__init__(range(rows))
        kinds = ("text", "image", "image and text")
        self.about = {"negatives": negatives}
        for side, there in (("queries", queries), ("positives", positives)):
            self.about[side] = {kind: int(kind in there) for kind in kinds}


def test_what_a_sub_batch_can_take():
    assert rows_needed(Source(9), 32, 1) == (0, 32, 32, 32)
    assert rows_needed(Source(9, ("image and text",), ("text",), negatives=3), 32, 1) == (32, 32, 0, 64)
    assert rows_needed(Source(9, ("text", "image"), ("text", "image and text"), negatives=3), 32, 2) == (32, 32, 96, 96)
    assert rows_needed([1, 2], 32, 2) == (0, 32, 0, 96)


TYPES = {"colpali": "ti", "visrag": "ti", "MSCOCO": "ii", "CIRR": "ii", "NIGHTS": "ii", "InfoSeek_it2it": "ii", "TAT-DQA": "ti"}
TYPES |= dict.fromkeys(("MSCOCO_t2i", "VisualNews_t2i", "VisDial", "WebQA"), "ti")  # all others: image to text


def published():
    """The published mixture, and sources of its types."""
    config = load_config("configs/7b.py", {})
    kinds = {"t": ("text",), "i": ("image",)}
    sources = []
    for name, *_ in config.data.sources:
        query, positive = TYPES.get(name, "it")
        sources.append(Source(1000, kinds[query], kinds[positive], negatives=1))
    sides = (("query_shapes", config.batch_size), ("candidate_shapes", 2 * config.batch_size))
    query, candidate = (slots(config, key, items, 64, np.arange(config.microbatch_size)).room for key, items in sides)
    return config, sources, (*query, *candidate)


def test_the_published_mixture_draws_by_weight_and_fits_its_shape_classes():
    """Chi-square of over 20,000 draws. Sub-batches are drawn, so a pair is drawn 32 at a time."""
    config, sources, room = published()
    names, weights, _ = zip(*config.data.sources, strict=True)
    needs = np.array([rows_needed(source, 32, 1) for source in sources])
    chosen = schedule(weights, needs, room, 12, 1700, names)
    assert (needs[chosen].sum(axis=1) <= room).all()
    drawn, wanted = np.bincount(chosen.ravel(), minlength=len(sources)), 20_400 * np.array(weights) / sum(weights)
    assert stats.chisquare(drawn, wanted).pvalue > 0.99  # nearer than chance would be
    assert np.abs(drawn - wanted).max() < 2
    config.steps = 20
    for step, references in enumerate(mixture(config, sources, room)):
        assert [reference.source for reference in references] == np.repeat(chosen[step], 32).tolist()


def test_no_row_is_left_out_and_a_prefix_does_not_depend_on_what_follows():
    sources = [Source(7), Source(5)]
    data = {"sources": (("a", 3.0, 0), ("b", 1.0, 0)), "sub_batch": 2, "negatives": 0}
    settings = ConfigDict({"seed": 0, "steps": 28, "batch_size": 8, "microbatch_size": 8, "data": data})
    steps = list(mixture(settings, sources, (0, 8, 8, 8)))
    of_a = [reference for step in steps for reference in step if reference.source == 0]
    assert [reference.epoch for reference in of_a] == list(np.repeat(range(24), 7))
    assert all(sorted(row.row for row in of_a[first : first + 7]) == list(range(7)) for first in range(0, 168, 7))
    settings.steps = 3
    assert list(mixture(settings, sources, (0, 8, 8, 8))) == steps[:3]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=3),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.integers(1, 4),
)
def test_every_step_is_filled_if_every_source_finds_rows_in_one(needs, room, places):
    """Against all choices of sources, one by one."""
    needs, room = np.array([(0, 0, *need) for need in needs]), (0, 0, *room)
    others = list(itertools.product(range(len(needs)), repeat=places - 1))
    possible = all(any((needs[[source, *rest]].sum(axis=0) <= room).all() for rest in others) for source in range(len(needs)))
    try:
        chosen = schedule([1.0] * len(needs), needs, room, places, 1, "abc"[: len(needs)])
    except UserError:
        assert not possible
    else:
        assert possible and (needs[chosen[0]].sum(axis=0) <= room).all()


def test_rows_that_distort_the_weights_are_refused():
    needs = np.array([[0, 1, 0, 0], [1, 1, 0, 0]])
    with pytest.raises(UserError, match=r"leaves 'b' 25.00 % of the pairs where its weight asks for 50.00 %.*2.0 images in query"):
        schedule([1.0, 1.0], needs, (1, 4, 0, 0), 4, 100, "ab")
    with pytest.raises(UserError, match=r"has no room for .b.*has 4.0 images in query_shapes, for 3 rows"):
        schedule([1.0], needs[1:], (3, 4, 0, 0), 4, 1, "b")
