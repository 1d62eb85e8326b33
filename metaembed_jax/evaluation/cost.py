"""Cost of a budget (r_q, r_c) for each document searched. The paper's table of efficiency is these two formulas."""


def maxsim_flops(budget: tuple[int, int], dimension: int) -> int:
    """Floating-point operations to score one document exactly: r_q * r_c dot products of `dimension` numbers."""
    query_vectors, document_vectors = budget
    return 2 * query_vectors * document_vectors * dimension


def index_bytes(vectors: int, dimension: int) -> int:
    """Bytes that one document of `vectors` vectors takes in a bf16 index."""
    return vectors * dimension * 2
