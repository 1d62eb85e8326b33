"""Costs of a budget for each searched document, by the two formulas of the paper's table of efficiency."""


def maxsim_flops(budget: tuple[int, int], dimension: int) -> int:
    """Return the FLOPs to score a document exactly, at a budget of (query, document) vectors of `dimension` numbers."""
    query_vectors, document_vectors = budget
    return 2 * query_vectors * document_vectors * dimension


def index_bytes(vectors: int, dimension: int) -> int:
    """Return the bytes of a document of `vectors` vectors in a bfloat16 index."""
    return vectors * dimension * 2
