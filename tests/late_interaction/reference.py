"""Float64 NumPy reference of the scores and the loss, written from the method's definition with plain loops."""

import numpy as np


def maxsim_scores(query_QRD, document_NRD):
    """s(q, c) = sum over i of max over j of <q_i, c_j>."""
    query_QRD, document_NRD = np.asarray(query_QRD, np.float64), np.asarray(document_NRD, np.float64)
    scores = np.zeros((len(query_QRD), len(document_NRD)))
    for q, query in enumerate(query_QRD):
        for n, document in enumerate(document_NRD):
            scores[q, n] = sum(max(vector @ other for other in document) for vector in query)
    return scores


def matryoshka(query, positive, negatives, groups, temperature=0.03, normalization="code", negative_mask=None, sources=None):
    """Loss, its gradients and the values of each group.

    Args:
      negative_mask: [B, K], false where a negative does not count.
      sources: [B]; positives of another source than the query's do not count.

    Returns:
      loss, (d_query, d_positive, d_negatives), [loss of each group], [accuracy of each group]; all float64.
    """
    query, positive, negatives = (np.asarray(x, np.float64) for x in (query, positive, negatives))
    gradients = tuple(np.zeros_like(x) for x in (query, positive, negatives))
    weight = 1 / len(groups) if normalization == "code" else 1.0
    sources = np.zeros(len(query)) if sources is None else sources
    negative_mask = np.ones(negatives.shape[:2], bool) if negative_mask is None else negative_mask
    counts = [[*(sources == sources[b]), *negative_mask[b]] for b in range(len(query))]
    results = [_group(query, positive, negatives, group, temperature, weight, gradients, counts) for group in groups]
    losses, accuracies = ([result[k] for result in results] for k in (0, 1))
    return weight * sum(losses), gradients, losses, accuracies


def _group(query, positive, negatives, group, temperature, weight, gradients, counts):
    d_query, d_positive, d_negatives = gradients
    (r_q, r_c), queries = group, len(query)
    loss = hits = 0.0
    for b in range(queries):
        candidates = [*positive, *negatives[b]]
        d_candidates = [*d_positive, *d_negatives[b]]  # views: adding to one adds to the gradient
        similarities = [query[b, :r_q] @ candidate[:r_c].T for candidate in candidates]
        scores = np.array([similarity.max(axis=1).sum() for similarity in similarities])
        scores[~np.array(counts[b])] = -np.inf
        logits = scores / temperature
        shifted = np.exp(logits - logits.max())
        loss += np.log(shifted.sum()) - (logits[b] - logits.max())
        hits += all(scores[b] > score for n, score in enumerate(scores) if n != b)
        for n, similarity in enumerate(similarities):
            coefficient = weight * (shifted[n] / shifted.sum() - (n == b)) / temperature / queries
            for i in range(r_q):
                j = similarity[i].argmax()
                d_query[b, i] += coefficient * candidates[n][j]
                d_candidates[n][j] += coefficient * query[b, i]
    return loss / queries, hits / queries
