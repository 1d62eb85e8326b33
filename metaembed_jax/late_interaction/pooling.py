"""Pooling of an item's vectors by hierarchical clustering, without training: the baseline of nested vectors at equal bytes.

Ward's method on the cosine distances of an item's vectors; each cluster becomes the mean of its vectors, of length one. The
clusters are those of sentence-transformers. colpali-engine pools in the same way, but its linkage takes the rows of the matrix of
distances as points.

N items, R vectors of an item at most, T of this one, D width.
"""

import numpy as np
from jaxtyping import Float, Int


def count_vectors(vectors_NRD: Float[np.ndarray, "N R D"]) -> Int[np.ndarray, " N"]:
    """Return the number of vectors of each item; the zeros after the last vector are padding."""
    is_vector_NR = vectors_NRD.any(axis=2)
    return np.where(is_vector_NR, np.arange(1, vectors_NRD.shape[1] + 1), 0).max(axis=1, initial=0)


class Pools:
    """Hierarchical clusters of the vectors of items, computed once and cut to any number of vectors.

    Args:
      vectors_NRD: unit vectors; zeros after an item's last vector are padding.
    """

    def __init__(self, vectors_NRD: Float[np.ndarray, "N R D"]):
        self._vectors_NRD, self._counts_N = vectors_NRD, count_vectors(vectors_NRD)
        items = zip(vectors_NRD, self._counts_N.tolist(), strict=True)
        self._links = [_link(vectors_RD[:count]) for vectors_RD, count in items]

    def pool(self, most: int) -> Float[np.ndarray, "N R D"]:
        """Return at most `most` vectors of each item, padded with zeros. An item with no more keeps its own, in their order."""
        from scipy.cluster.hierarchy import fcluster

        pooled_NRD = np.zeros((len(self._vectors_NRD), most, self._vectors_NRD.shape[2]), np.float32)
        for item, (count, links) in enumerate(zip(self._counts_N.tolist(), self._links, strict=True)):
            vectors_TD = self._vectors_NRD[item, :count]
            if count > most:
                vectors_TD = _means(vectors_TD, fcluster(links, most, "maxclust") - 1)
            pooled_NRD[item, : len(vectors_TD)] = vectors_TD
        return pooled_NRD


def pooling_flops(vectors: float, width: int) -> float:
    """Count the FLOPs of the distances and the means of an item with that many vectors; the clustering itself has no products."""
    return vectors * (vectors - 1) * width + vectors * width


def _link(vectors_TD: Float[np.ndarray, "T D"]) -> Float[np.ndarray, "links 4"]:
    """Return Ward's tree over the cosine distances of an item's vectors; empty for a single one."""
    from scipy.cluster.hierarchy import ward

    if len(vectors_TD) < 2:
        return np.zeros((0, 4))
    distances_TT = np.clip(1 - vectors_TD @ vectors_TD.T, 0, 2)
    return ward(distances_TT[np.triu_indices(len(vectors_TD), 1)])


def _means(vectors_TD: Float[np.ndarray, "T D"], clusters_T: Int[np.ndarray, " T"]) -> Float[np.ndarray, "R D"]:
    """Return the mean of each cluster, of length one. Equal distances may leave fewer clusters than were asked for."""
    sums_RD = np.zeros((clusters_T.max() + 1, vectors_TD.shape[1]), np.float64)
    np.add.at(sums_RD, clusters_T, vectors_TD)
    lengths_R1 = np.linalg.norm(sums_RD, axis=1, keepdims=True)
    return (sums_RD / np.maximum(lengths_R1, 1e-12)).astype(np.float32)
