"""Terms of the Matryoshka loss, functions of the margins: the score of each document minus the score of the query's positive.

B pairs of the global batch, b queries of this device, M = B + K documents that a query ranks, G groups. A query has K hard
negatives and C = 1 + K candidates: its positive, then its hard negatives. Terms are sums over this device's queries.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.prefixes import cut
from metaembed_jax.precision import float32_einsum


class Terms(NamedTuple):
    """The weights of all terms but the cross-entropy, and their settings, as `matryoshka_loss` describes them."""

    self_distillation: float
    self_distillation_temperature: float | None
    symmetric: float
    false_negative_margin: float | None
    teacher_weight: float
    teacher_loss: str
    teacher_temperature: float


def check_terms(terms: Terms) -> None:
    """Check the values.

    Raises:
      UserError: a weight or the margin is negative, a temperature is not positive, or the teacher's loss is unknown.
    """
    for name in ("self_distillation", "symmetric", "false_negative_margin", "teacher_weight"):
        value = getattr(terms, name)
        if value is not None and not value >= 0:
            raise UserError(f"{name}={value}: expected a non-negative number")
    for name in ("self_distillation_temperature", "teacher_temperature"):
        value = getattr(terms, name)
        if value is not None and not value > 0:
            raise UserError(f"{name}={value}: expected a positive number")
    if terms.teacher_loss not in ("kl", "margin"):
        raise UserError(f"teacher_loss={terms.teacher_loss!r}: expected 'kl' or 'margin'")


def targets(labels_bC: Float[Array, "b C"], mask_bK: Bool[Array, "b K"]) -> Float[Array, "b C"]:
    """Return the labels of a query's candidates divided by their sum; the positive alone if the sum is 0.

    Args:
      mask_bK: False marks hard negatives that are padding; their labels do not count.
    """
    labels_bC = jnp.concatenate([labels_bC[:, :1], jnp.where(mask_bK, labels_bC[:, 1:], 0)], axis=1)
    total_b1 = labels_bC.sum(1, keepdims=True)
    positive_C = (jnp.arange(labels_bC.shape[1]) == 0).astype(labels_bC.dtype)
    return jnp.where(total_b1 > 0, labels_bC / jnp.where(total_b1 > 0, total_b1, 1), positive_C)


def cross_entropies(
    margins_GbM: Float[Array, "G b M"], temperature: Float[Array, ""], target_bC: Float[Array, "b C"] | None
) -> Float[Array, " G"]:
    """Return the cross-entropies of the targets and the softmax over documents.

    Args:
      margins_GbM: -inf for documents that a query does not rank.
      target_bC: from `targets`; None: the positive alone.
    """
    # The margin of the positive is 0, so the log of the sum is minus its log-probability.
    losses_Gb = jax.nn.logsumexp(margins_GbM / temperature, axis=2)
    if target_bC is not None:
        margins_GbK, target_bK = margins_GbM[..., margins_GbM.shape[2] - target_bC.shape[1] + 1 :], target_bC[:, 1:]
        losses_Gb -= (target_bK * jnp.where(target_bK > 0, margins_GbK, 0)).sum(2) / temperature
    return losses_Gb.sum(1)


def hits(
    margins_GbM: Float[Array, "G b M"], positive_b: Int[Array, " b"], target_bC: Float[Array, "b C"] | None
) -> Float[Array, " G"]:
    """Return the numbers of queries that rank a right document strictly above every wrong one.

    Args:
      margins_GbM: -inf for documents that a query does not rank.
      positive_b: the columns of the positives.
      target_bC: candidates above 0 are right; None: the positive alone.
    """
    is_right_bM = jnp.arange(margins_GbM.shape[2]) == positive_b[:, None]
    best_right = 0
    if target_bC is not None:
        is_right_bC = target_bC > 0
        pairs = margins_GbM.shape[2] - is_right_bC.shape[1] + 1
        is_right_bM = jnp.concatenate([is_right_bM[:, :pairs] & is_right_bC[:, :1], is_right_bC[:, 1:]], axis=1)
        best_right = jnp.where(is_right_bM, margins_GbM, -jnp.inf).max(2, keepdims=True)
    return jnp.all(is_right_bM | (margins_GbM < best_right), axis=2).astype(jnp.float32).sum(1)


def without_false_negatives(
    margins_bM: Float[Array, "b M"],
    ranked_bM: Bool[Array, "b M"],
    target_bC: Float[Array, "b C"] | None,
    largest_margin: float,
    pairs: int,
) -> tuple[Bool[Array, "b M"], Float[Array, "2"]]:
    """Return the documents that a query ranks without those beyond the largest margin, and how many rows and negatives these are.

    Args:
      margins_bM: of the largest group.
      target_bC: candidates above 0 stay.
      pairs: B.
    """
    is_false_bM = ranked_bM & (jax.lax.stop_gradient(margins_bM) > largest_margin)
    if target_bC is not None:
        is_false_bM = jnp.concatenate([is_false_bM[:, :pairs], is_false_bM[:, pairs:] & (target_bC[:, 1:] == 0)], axis=1)
    false_2 = jnp.stack([is_false_bM[:, :pairs].sum(), is_false_bM[:, pairs:].sum()]).astype(jnp.float32)
    return ranked_bM & ~is_false_bM, false_2


def self_distillation_losses(
    margins_GbM: Float[Array, "G b M"], ranked_bM: Bool[Array, "b M"], temperature: Float[Array, ""], own_temperature: float | None
) -> Float[Array, " G"]:
    """Return the divergences of each group's softmax over documents from the largest group's; of the largest, 0.

    Args:
      temperature: of the loss.
      own_temperature: of both softmaxes; None: that of the loss.
    """
    factor = 1.0 if own_temperature is None else own_temperature / temperature
    logits_GbM = margins_GbM / (factor * temperature)
    losses_G = factor**2 * _divergences(logits_GbM[-1], logits_GbM[:-1], ranked_bM).sum(1)
    return jnp.pad(losses_G, (0, 1))


def symmetric_losses(
    margins_GbM: Float[Array, "G b M"],
    scores_Gb: Float[Array, "G b"],
    ranked_bM: Bool[Array, "b M"],
    temperature: Float[Array, ""],
    first: int | Int[Array, ""],
    axes: tuple[str, ...] | None,
) -> Float[Array, " G"]:
    """Return the cross-entropies of the softmax over queries, for the positives of this device's pairs.

    Args:
      scores_Gb: from `positive_scores`.
      first: this device's pairs are first, first + 1, ...
      axes: of the mesh, over which the queries are sharded; None outside of `shard_map`.
    """
    queries = scores_Gb.shape[1]
    score_GB = jax.lax.all_gather(scores_Gb, axes, axis=1, tiled=True) if axes else scores_Gb
    # Scores of queries minus the score of the document's own query, whose margin is 0.
    margins_GbB = margins_GbM[..., : score_GB.shape[1]] + (scores_Gb[..., None] - score_GB[:, None])
    logits_GbB = jnp.where(ranked_bM[:, : score_GB.shape[1]], margins_GbB, -jnp.inf) / temperature
    largest_GB = jax.lax.stop_gradient(logits_GbB).max(1)
    largest_GB = jax.lax.pmax(largest_GB, axes) if axes else largest_GB
    sum_GB = jnp.exp(logits_GbB - largest_GB[:, None]).sum(1)
    losses_GB = largest_GB + jnp.log(jax.lax.psum(sum_GB, axes) if axes else sum_GB)
    return jax.lax.dynamic_slice_in_dim(losses_GB, first, queries, axis=1).sum(1)


def positive_scores(
    query_bRD: Float[Array, "b R D"], document_bJD: Float[Array, "b J D"], budgets: tuple[Budget, ...], axes: tuple[str, ...] | None
) -> Float[Array, "G b"]:
    """Return the score of each pair at each budget, minus the mean over all pairs.

    Only their differences are used. Without the mean they are small numbers, and their float32 steps are small too.

    Args:
      axes: as in `symmetric_losses`.
    """
    scores = []
    for r_q, r_c, width in budgets:
        vectors = (cut(x, width) for x in (query_bRD[:, :r_q], document_bJD[:, :r_c]))
        similarity_bRj = float32_einsum("brd,bjd->brj", *vectors)
        first_bR1 = similarity_bRj.argmax(2, keepdims=True)  # of equal similarities, the first has the gradient
        maximum_bR = jnp.take_along_axis(similarity_bRj, first_bR1, axis=2)[..., 0]
        mean_R = jax.lax.stop_gradient(maximum_bR).mean(0)
        scores.append((maximum_bR - (jax.lax.pmean(mean_R, axes) if axes else mean_R)).sum(1))
    return jnp.stack(scores)


def teacher_losses(
    margins_GbM: Float[Array, "G b M"],
    scores_bC: Float[Array, "b C"],
    mask_bK: Bool[Array, "b K"],
    temperature: Float[Array, ""],
    terms: Terms,
) -> Float[Array, " G"]:
    """Return the distances of each group's scores of a query's candidates from the teacher's.

    Args:
      scores_bC: the teacher's; a candidate without one is NaN and is left out. Without a score of the positive, all are.
      mask_bK: False marks hard negatives that are padding.
    """
    negatives = mask_bK.shape[1]
    margins_GbK = margins_GbM[..., margins_GbM.shape[2] - negatives :]
    has_score_bK = mask_bK & jnp.isfinite(scores_bC[:, 1:]) & jnp.isfinite(scores_bC[:, :1])
    teacher_bK = jnp.where(has_score_bK, scores_bC[:, 1:] - scores_bC[:, :1], 0) / terms.teacher_temperature
    logits_GbK = margins_GbK / temperature
    if terms.teacher_loss == "margin":
        squares_GbK = jnp.where(has_score_bK, jnp.square(logits_GbK - teacher_bK), 0)
        return (squares_GbK.sum(2) / jnp.maximum(has_score_bK.sum(1), 1)).sum(1)

    def with_positive(x, value):
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(1, 0)], constant_values=value)

    return _divergences(with_positive(teacher_bK, 0), with_positive(logits_GbK, 0), with_positive(has_score_bK, True)).sum(1)


def _divergences(teacher_bM, student_GbM, mask_bM):
    """Return KL(teacher || student) [G, b] of softmaxes of logits where the mask is True; no gradient goes to the teacher."""
    teacher_bM = jnp.where(mask_bM, jax.lax.stop_gradient(teacher_bM), -jnp.inf)
    probability_bM, total_b = jax.nn.softmax(teacher_bM, axis=1), jax.nn.logsumexp(teacher_bM, axis=1)
    difference_GbM = jnp.where(mask_bM, teacher_bM - student_GbM, 0)
    total_Gb = jax.nn.logsumexp(jnp.where(mask_bM, student_GbM, -jnp.inf), axis=2)
    return (probability_bM * difference_GbM).sum(2) + total_Gb - total_b
