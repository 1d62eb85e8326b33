"""Sizes of arrays that are rounded."""

from metaembed_jax.late_interaction.sizes import ceil_power, floor_power, round_up


def test_powers_of_two():
    assert [floor_power(number) for number in (0, 1, 2, 3, 4, 7, 8)] == [1, 1, 2, 2, 4, 4, 8]
    assert [ceil_power(number) for number in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]


def test_multiples():
    assert [round_up(size, 8) for size in (0, 1, 8, 9)] == [0, 8, 8, 16]
