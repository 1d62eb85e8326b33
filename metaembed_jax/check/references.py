"""Float64 NumPy references of attention, linear maps and MaxSim, with gradients, written from their definitions.

They share no code with the implementations. The tests use them too.

B batch, S queries, T keys, H heads, G key heads, K head width; Q queries, N documents, R vectors of an item, D their width.
"""

import numpy as np
from jaxtyping import Bool, Float


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
