"""Costs of a budget for each searched document, by the two formulas of the paper's table of efficiency."""

from metaembed_jax.late_interaction.groups import Budget


def maxsim_flops(budget: Budget, dimension: int) -> int:
    """Return the FLOPs to score a document exactly, at a budget of vectors of `dimension` numbers."""
    return 2 * budget.query * budget.document * budget.numbers(dimension)


def index_bytes(budget: Budget, dimension: int, side: int = 1) -> int:
    """Return the bytes of the vectors of a document, or of side 0, a query, in a bfloat16 index of vectors that are cut."""
    return budget[side] * budget.numbers(dimension) * 2
