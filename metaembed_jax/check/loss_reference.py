"""Float64 NumPy reference of the Matryoshka loss, with gradients, written from its definition.

It shares no code with the implementation. The tests use it too.

B pairs, K hard negatives a pair, M = B + K documents that a query may rank, C = 1 + K candidates, R vectors of an item, D width, G
groups.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class Reference(NamedTuple):
    """The loss, float64.

    Attributes:
      gradients: of queries, positives and negatives.
      figures: by name, [G]; "false_negatives" [2] are the rows and the negatives that are not ranked.
    """

    loss: float
    gradients: tuple[np.ndarray, ...]
    figures: dict[str, np.ndarray]


def matryoshka(
    query,
    positive,
    negatives,
    groups: Sequence[tuple[int, ...]],
    temperature: float = 0.03,
    normalization: str = "code",
    negative_mask=None,
    sources=None,
    digests=None,
    labels=None,
    teacher_scores=None,
    *,
    self_distillation: float = 0.0,
    self_distillation_temperature: float | None = None,
    symmetric: float = 0.0,
    false_negative_margin: float | None = None,
    teacher_weight: float = 0.0,
    teacher_loss: str = "kl",
    teacher_temperature: float = 1.0,
    fixed: tuple | None = None,
) -> Reference:
    """Return the loss of `matryoshka_loss` for the same arguments.

    Args:
      fixed: vectors for the parts that have no gradient, the distribution that distils and the choice of false negatives; the same
        vectors by default.
    """
    vectors = tuple(np.asarray(x, np.float64) for x in (query, positive, negatives))
    pairs, hard = vectors[2].shape[:2]
    mask_BK = np.ones((pairs, hard), bool) if negative_mask is None else np.asarray(negative_mask)
    target_BM = _targets(pairs, mask_BK, labels)
    ranked_BM = _ranked(mask_BK, target_BM, sources, digests)
    largest_BM = _scores(fixed or vectors, groups[-1])
    kept_BM, figures = ranked_BM, {}
    if false_negative_margin is not None:
        beyond_BM = largest_BM - np.diagonal(largest_BM)[:, None] > false_negative_margin * groups[-1][0]
        beyond_BM &= ranked_BM & (np.arange(pairs + hard) != np.arange(pairs)[:, None]) & (target_BM == 0)
        kept_BM = ranked_BM & ~beyond_BM
        figures["false_negatives"] = beyond_BM[:, :pairs].sum(), beyond_BM[:, pairs:].sum()
    kl_temperature = temperature if self_distillation_temperature is None else self_distillation_temperature
    taught_BM = _softmax(largest_BM / kl_temperature, kept_BM)
    teacher_arguments = mask_BK, teacher_scores, teacher_loss, temperature, teacher_temperature
    loss, gradients = 0.0, tuple(np.zeros_like(x) for x in vectors)
    share = 1 / len(groups) if normalization == "code" else 1.0
    for group in groups:
        scores_BM = _scores(vectors, group)
        terms = {"loss": (1.0, _cross_entropy(scores_BM, kept_BM, target_BM, temperature))}
        if symmetric:
            value, d_scores_BB = _cross_entropy(scores_BM[:, :pairs].T, kept_BM[:, :pairs].T, np.eye(pairs), temperature)
            terms["symmetric"] = symmetric, (value, np.pad(d_scores_BB.T, ((0, 0), (0, hard))))
        if self_distillation and group != groups[-1]:
            value, d_scores_BM = _divergence(scores_BM, kept_BM, taught_BM, kl_temperature)
            terms["self_distillation"] = self_distillation * (kl_temperature / temperature) ** 2, (value, d_scores_BM)
        if teacher_weight:
            terms["teacher"] = teacher_weight, _teacher(scores_BM, *teacher_arguments)
        d_scores_BM = share * sum(weight * d_scores_BM for weight, (_, d_scores_BM) in terms.values())
        loss += share * sum(weight * value for weight, (value, _) in terms.values())
        for gradient, d_vectors in zip(gradients, _vector_gradients(vectors, group, d_scores_BM), strict=True):
            gradient += d_vectors
        values = {name: value for name, (_, (value, _)) in terms.items()} | {"accuracy": _accuracy(scores_BM, ranked_BM, target_BM)}
        if "self_distillation" in values:
            values["self_distillation"] *= (kl_temperature / temperature) ** 2
        for name, value in values.items():
            figures.setdefault(name, []).append(value)
    return Reference(loss, gradients, {name: np.array(values) for name, values in figures.items()})


def _targets(pairs, mask_BK, labels) -> Float[np.ndarray, "B M"]:
    """Return each query's distribution over its documents."""
    target_BM = np.pad(np.eye(pairs), ((0, 0), (0, mask_BK.shape[1])))
    if labels is not None:
        for b, label_C in enumerate(np.asarray(labels, np.float64)):
            label_C = label_C * np.concatenate([[True], mask_BK[b]])
            if label_C.sum():
                target_BM[b, b], target_BM[b, pairs:] = label_C[0] / label_C.sum(), label_C[1:] / label_C.sum()
    return target_BM


def _ranked(mask_BK, target_BM, sources, digests) -> Bool[np.ndarray, "B M"]:
    """Return the documents that queries rank: its own row, documents of its source, and none that is right but no target."""
    pairs = len(mask_BK)
    ranked_BM = np.concatenate([np.ones((pairs, pairs), bool), mask_BK], axis=1)
    for b in range(pairs):
        if sources is not None:
            ranked_BM[b, :pairs] = sources == sources[b]
        if digests is None:
            continue
        queries, positives, negatives = digests
        right = {tuple(positives[n]) for n in range(pairs) if tuple(queries[n]) == tuple(queries[b])}
        right |= {tuple(negatives[b, k]) for k in range(mask_BK.shape[1]) if target_BM[b, pairs + k] > 0}
        for m, document in enumerate((*positives, *negatives[b])):
            ranked_BM[b, m] &= tuple(document) not in right or m == b or (m >= pairs and target_BM[b, m] > 0)
    return ranked_BM


def _cut(vectors, group) -> tuple[list, list]:
    """Return the vectors that a group uses, of length 1 at its width, and the lengths that they were divided by."""
    (r_q, r_c), width = group[:2], group[2] if len(group) > 2 and group[2] else vectors[0].shape[-1]
    prefixes = [x[..., :r, :width] for x, r in zip(vectors, (r_q, r_c, r_c), strict=True)]
    if width == vectors[0].shape[-1]:  # the loss takes the vectors as they are
        return prefixes, [np.ones((*x.shape[:-1], 1)) for x in prefixes]
    lengths = [np.linalg.norm(x, axis=-1, keepdims=True) for x in prefixes]
    return [x / length for x, length in zip(prefixes, lengths, strict=True)], lengths


def _similarities(query, positive, negatives) -> list[Float[np.ndarray, "M R J"]]:
    """Return the similarities of each query's vectors to those of its documents."""
    return [query[b] @ np.swapaxes(np.concatenate([positive, negatives[b]]), 1, 2) for b in range(len(query))]


def _scores(vectors, group) -> Float[np.ndarray, "B M"]:
    return np.stack([similarity_MRJ.max(2).sum(1) for similarity_MRJ in _similarities(*_cut(vectors, group)[0])])


def _vector_gradients(vectors, group, d_scores_BM) -> list[np.ndarray]:
    """Return the gradients of the vectors from those of the group's scores."""
    (query, positive, negatives), lengths = _cut(vectors, group)
    gradients = [np.zeros_like(x) for x in (query, positive, negatives)]
    for b, similarity_MRJ in enumerate(_similarities(query, positive, negatives)):
        coefficient_MRJ = np.zeros_like(similarity_MRJ)
        m, i = np.indices(similarity_MRJ.shape[:2])
        coefficient_MRJ[m, i, similarity_MRJ.argmax(2)] = d_scores_BM[b][:, None]
        document_MJD = np.concatenate([positive, negatives[b]])
        gradients[0][b] += np.einsum("mrj,mjd->rd", coefficient_MRJ, document_MJD, optimize=True)
        d_document_MJD = np.swapaxes(coefficient_MRJ, 1, 2) @ query[b]
        gradients[1] += d_document_MJD[: len(positive)]
        gradients[2][b] += d_document_MJD[len(positive) :]
    whole_gradients = [np.zeros_like(x) for x in vectors]
    for whole, gradient, unit, length in zip(whole_gradients, gradients, (query, positive, negatives), lengths, strict=True):
        if unit.shape[-1] < whole.shape[-1]:
            gradient = (gradient - (gradient * unit).sum(-1, keepdims=True) * unit) / length
        whole[..., : unit.shape[-2], : unit.shape[-1]] = gradient
    return whole_gradients


def _softmax(logits, mask):
    exponentials = np.where(mask, np.exp(logits - np.where(mask, logits, -np.inf).max(1, keepdims=True)), 0)
    return exponentials / exponentials.sum(1, keepdims=True)


def _log_softmax(logits, mask):
    """Return the log-probabilities, 0 where the mask is False."""
    shifted = logits - np.where(mask, logits, -np.inf).max(1, keepdims=True)
    return np.where(mask, shifted - np.log(np.where(mask, np.exp(shifted), 0).sum(1, keepdims=True)), 0)


def _cross_entropy(scores, ranked, target, temperature):
    """Return the mean over rows, and the gradient of the scores."""
    logits = scores / temperature
    value = -(target * _log_softmax(logits, ranked)).sum() / len(scores)
    return value, (_softmax(logits, ranked) - target) / temperature / len(scores)


def _divergence(scores, ranked, taught, temperature):
    """Return the mean of KL(taught || softmax) over rows, and the gradient of the scores."""
    logits = scores / temperature
    log_taught = np.log(np.where(taught > 0, taught, 1))
    value = (taught * (log_taught - _log_softmax(logits, ranked))).sum() / len(scores)
    return value, (_softmax(logits, ranked) - taught) / temperature / len(scores)


def _teacher(scores_BM, mask_BK, teacher_scores, kind, temperature, teacher_temperature):
    """Return the mean distance of candidates' scores from the teacher's over queries, and the gradient of the scores."""
    pairs, value, d_scores_BM = len(mask_BK), 0.0, np.zeros_like(scores_BM)
    for b, teacher_C in enumerate(np.asarray(teacher_scores, np.float64)):
        scored = np.flatnonzero(np.isfinite(teacher_C) & np.concatenate([[True], mask_BK[b]]))
        if len(scored) < 2 or scored[0] != 0:
            continue
        columns = np.where(scored == 0, b, pairs + scored - 1)
        logits, taught = scores_BM[b, columns] / temperature, teacher_C[scored] / teacher_temperature
        if kind == "kl":
            mask = np.ones((1, len(columns)), bool)
            distance, (d_logits,) = _divergence(logits[None], mask, _softmax(taught[None], mask), 1.0)
        else:
            errors = (logits[1:] - logits[0]) - (taught[1:] - taught[0])
            distance, d_errors = (errors**2).mean(), 2 * errors / len(errors)
            d_logits = np.concatenate([[-d_errors.sum()], d_errors])
        value += distance / pairs
        d_scores_BM[b, columns] += d_logits / temperature / pairs
    return value, d_scores_BM


def _accuracy(scores_BM, ranked_BM, target_BM) -> float:
    """Return the share of queries with a right document above every wrong one."""
    right = np.where(target_BM > 0, scores_BM, -np.inf).max(1)
    wrong = np.where(ranked_BM & (target_BM == 0), scores_BM, -np.inf).max(1)
    return (right > wrong).mean()
