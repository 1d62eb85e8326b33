"""What a budget (r_q, r_c) costs for each candidate searched. The paper's table of efficiency is these two formulas."""


def maxsim_flops(budget: tuple[int, int], dimension: int) -> int:
    """Floating-point operations to score one candidate exactly: r_q * r_c dot products of `dimension` numbers."""
    query_vectors, candidate_vectors = budget
    return 2 * query_vectors * candidate_vectors * dimension


def index_bytes(vectors: int, dimension: int) -> int:
    """Bytes one candidate of `vectors` vectors takes in a bf16 index."""
    return vectors * dimension * 2
