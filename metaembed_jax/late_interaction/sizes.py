"""Sizes of arrays that are rounded, so that few programs are compiled, or to whole registers."""


def floor_power(number: int) -> int:
    """Return the largest power of two that is at most a number; at least 1."""
    return 1 << max(number, 1).bit_length() - 1


def ceil_power(number: int) -> int:
    """Return the smallest power of two that is at least a positive number."""
    return 1 << (number - 1).bit_length()


def round_up(size: int, multiple: int) -> int:
    """Return the smallest multiple that is at least a size."""
    return -(-size // multiple) * multiple
