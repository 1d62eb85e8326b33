"""Float64 NumPy references of attention, linear maps, MaxSim and the loss, with gradients, written from their definitions.

They share no code with the implementations. The tests use them too.

B batch, S queries, T keys, H heads, G key heads, K head width; Q queries, N documents, R vectors of an item, D their width.
"""

import numpy as np
from jaxtyping import Bool, Float

from metaembed_jax.late_interaction.groups import Budget


def visible(position_BS, T: int, causal: bool, window: int | None = None) -> Bool[np.ndarray, "B S T"]:
    """Return the keys that each query sees: with `causal`, those up to its own position, or the last `window` of them."""
    position_BS1, key = np.asarray(position_BS)[..., None], np.arange(T)
    if not causal:
        return np.ones((*position_BS1.shape[:-1], T), bool)
    return (key <= position_BS1) & (key > position_BS1 - (T if window is None else window))


def rotated(x_BSHK, cos_BSK, sin_BSK) -> Float[np.ndarray, "B S H K"]:
    """Return rotary embeddings of two halves; with negative sines, the inverse, which rotates gradients."""
    first, second = np.split(np.asarray(x_BSHK, np.float64), 2, axis=-1)
    return x_BSHK * cos_BSK[:, :, None] + np.concatenate([-second, first], axis=-1) * sin_BSK[:, :, None]


def attention(query, key, value, mask_BST, cotangent, scale: float | None = None, softcap: float | None = None) -> tuple:
    """Return the output and the gradients of query, key and value. The output of a query that sees nothing is 0."""
    query, key, value, cotangent = (np.asarray(x, np.float64) for x in (query, key, value, cotangent))
    (B, _, H, K), G = query.shape, key.shape[2]
    factor = K**-0.5 if scale is None else scale
    output, *gradients = (np.zeros_like(x) for x in (query, query, key, value))
    for b, h in np.ndindex(B, H):
        g = h // (H // G)
        q, k, v, d_out = query[b, :, h], key[b, :, g], value[b, :, g], cotangent[b, :, h]
        scores, slope = factor * q @ k.T, np.ones(())
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
            slope = 1 - (scores / softcap) ** 2
        weights = _softmax(scores, mask_BST[b])
        output[b, :, h] = weights @ v
        d_weights = d_out @ v.T
        d_scores = factor * slope * weights * (d_weights - (d_weights * weights).sum(1, keepdims=True))
        for gradient, head, share in zip(gradients, (h, g, g), (d_scores @ k, d_scores.T @ q, weights.T @ d_out), strict=True):
            gradient[b, :, head] += share
    return output, *gradients


def _softmax(scores_ST, mask_ST):
    scores_ST = np.where(mask_ST, scores_ST, -np.inf)
    largest = scores_ST.max(1, keepdims=True)
    weights = np.exp(scores_ST - np.where(np.isfinite(largest), largest, 0))
    return weights / np.maximum(weights.sum(1, keepdims=True), np.finfo(np.float64).tiny)


def linear(x, kernel, cotangent) -> tuple:
    """Return x @ kernel and the gradients of x and kernel."""
    x, kernel, cotangent = (np.asarray(array, np.float64) for array in (x, kernel, cotangent))
    return x @ kernel, cotangent @ kernel.T, x.T @ cotangent


def maxsim_scores(query_QRD, document_NRD, mask_NR=None) -> Float[np.ndarray, "Q N"]:
    """Return s(q, c) = sum over i of max over j of <q_i, c_j>; vectors that the mask has False for win no maximum."""
    query_QRD, document_NRD = np.asarray(query_QRD, np.float64), np.asarray(document_NRD, np.float64)
    scores = np.zeros((len(query_QRD), len(document_NRD)))
    for n, document in enumerate(document_NRD):
        similarity_QRJ = query_QRD @ document.T
        if mask_NR is not None:
            similarity_QRJ = np.where(mask_NR[n], similarity_QRJ, -np.inf)
        scores[:, n] = similarity_QRJ.max(2).sum(1)
    return scores


def matryoshka(
    query,
    positive,
    negatives,
    groups: tuple[Budget, ...],
    temperature: float = 0.03,
    normalization: str = "code",
    negative_mask=None,
    sources=None,
    digests=None,
) -> tuple:
    """Return the loss, its gradients, and the loss and accuracy of each group.

    Args:
      negative_mask: [B, K], False for negatives that do not count.
      sources: [B]; positives of another source than the query's do not count.
      digests: (queries [B, W], positives [B, W], negatives [B, K, W]), equal for the same items: of a query's documents, its own
        row counts, and none that is a positive of the same query.

    Returns:
      loss, (d_query, d_positive, d_negatives), [loss of each group], [accuracy of each group]; all float64.
    """
    query, positive, negatives = (np.asarray(x, np.float64) for x in (query, positive, negatives))
    gradients = tuple(np.zeros_like(x) for x in (query, positive, negatives))
    weight = 1 / len(groups) if normalization == "code" else 1.0
    sources = np.zeros(len(query)) if sources is None else sources
    negative_mask = np.ones(negatives.shape[:2], bool) if negative_mask is None else negative_mask
    losses, accuracies = np.zeros(len(groups)), np.zeros(len(groups))
    for b in range(len(query)):
        counts = np.concatenate([sources == sources[b], negative_mask[b]])
        if digests is not None:
            counts &= ~_is_right(b, *digests)
        document_MJD = np.concatenate([positive, negatives[b]])
        similarity_MRJ = query[b] @ np.swapaxes(document_MJD, 1, 2)
        coefficient_MRJ = np.zeros_like(similarity_MRJ)
        for number, (r_q, r_c) in enumerate(groups):
            group_MRJ = similarity_MRJ[:, :r_q, :r_c]
            scores_M = np.where(counts, group_MRJ.max(2).sum(1), -np.inf)
            logits_M = scores_M / temperature
            shifted_M = np.exp(logits_M - logits_M.max())
            losses[number] += np.log(shifted_M.sum()) - (logits_M[b] - logits_M.max())
            accuracies[number] += (np.delete(scores_M, b) < scores_M[b]).all()
            d_score_M = (shifted_M / shifted_M.sum() - (np.arange(len(scores_M)) == b)) * weight / temperature / len(query)
            m, i = np.indices(group_MRJ.shape[:2])
            coefficient_MRJ[m, i, group_MRJ.argmax(2)] += d_score_M[:, None]
        gradients[0][b] += np.einsum("mrj,mjd->rd", coefficient_MRJ, document_MJD, optimize=True)
        d_document_MJD = np.swapaxes(coefficient_MRJ, 1, 2) @ query[b]
        gradients[1][...] += d_document_MJD[: len(positive)]
        gradients[2][b] += d_document_MJD[len(positive) :]
    losses, accuracies = losses / len(query), accuracies / len(query)
    return weight * losses.sum(), gradients, losses, accuracies


def _is_right(b, queries, positives, negatives) -> Bool[np.ndarray, "M"]:
    """Return which other documents of query b are positives of it, or of a query that is the same."""
    right = {tuple(positive) for query, positive in zip(queries, positives, strict=True) if tuple(query) == tuple(queries[b])}
    is_right = np.array([tuple(document) in right for document in (*positives, *negatives[b])])
    is_right[b] = False  # its own row
    return is_right
