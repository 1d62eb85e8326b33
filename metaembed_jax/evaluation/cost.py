"""Costs of a budget for each searched document, by the two formulas of the paper's table of efficiency."""

from metaembed_jax.late_interaction.groups import Budget


def maxsim_flops(budget: Budget, dimension: int, used: tuple[float, float] | None = None) -> int:
    """Return the FLOPs to score a document exactly, at a budget of vectors of `dimension` numbers.

    Args:
      used: mean numbers of vectors of a query and of a document, if they are not those of the budget.
    """
    query_vectors, document_vectors = used or budget[:2]
    return round(2 * query_vectors * document_vectors * budget.numbers(dimension))


def index_bytes(budget: Budget, dimension: int, side: int = 1, used: tuple[float, float] | None = None) -> int:
    """Return the bytes of the vectors of a document, or of side 0, a query, in a bfloat16 index of vectors that are cut.

    Args:
      used: as for `maxsim_flops`.
    """
    return round((used or budget)[side] * budget.numbers(dimension) * 2)
