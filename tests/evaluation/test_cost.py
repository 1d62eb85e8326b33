"""The costs against the figures published for the 7B: 100,000 documents, 3,584 numbers a vector, bf16."""

import pytest

from metaembed_jax.evaluation.cost import index_bytes, maxsim_flops
from metaembed_jax.late_interaction.groups import Budget


@pytest.mark.parametrize("budget, gigaflop, gibibyte", [((1, 1), 0.71, 0.68), ((8, 16), 91.75, 10.68), ((16, 64), 733.89, 42.72)])
def test_published_figures(budget, gigaflop, gibibyte):
    assert 100_000 * maxsim_flops(Budget(*budget), 3584) / 1e9 == pytest.approx(gigaflop, rel=0.01)
    assert 100_000 * index_bytes(Budget(*budget), 3584) / 2**30 == pytest.approx(gibibyte, rel=0.02)


def test_exact():
    assert maxsim_flops(Budget(2, 3), 5) == 60 and maxsim_flops(Budget(2, 3, 4), 5) == 48
    assert index_bytes(Budget(2, 3), 5) == 30 and index_bytes(Budget(2, 3, 4), 5) == 24
    assert index_bytes(Budget(2, 3, 4), 5, side=0) == 16
