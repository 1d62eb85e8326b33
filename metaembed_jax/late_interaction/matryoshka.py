"""The Matryoshka multi-vector contrastive loss (MetaEmbed, arXiv 2509.18095), all groups from one pass.

Cross-entropy needs only the margins of the documents, so the terms of the loss are functions of them (`margins`).

B pairs, K hard negatives a pair, M = B + K documents that a query ranks, G groups. Inside `shard_map`, queries and hard negatives
are those of this device, and the positives are those of all devices, N.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.groups import GROUPS, Budget, validate_groups
from metaembed_jax.late_interaction.margins import budget_margins
from metaembed_jax.late_interaction.right_documents import ItemDigests, check_digests, ranked_documents
from metaembed_jax.late_interaction.terms import (
    Terms,
    check_terms,
    cross_entropies,
    hits,
    positive_scores,
    self_distillation_losses,
    symmetric_losses,
    targets,
    teacher_losses,
    without_false_negatives,
)
from metaembed_jax.sharding import BATCH_AXES, batch_shards


class Pairs(NamedTuple):
    """Arrays of pairs, as the arguments of `matryoshka_loss`, sharded by pair."""

    query: Float[Array, "B Rq D"]
    document: Float[Array, "B Rc D"]
    negatives: Float[Array, "B K Rc D"]
    negative_mask: Bool[Array, "B K"]
    labels: Float[Array, "B C"] | None
    teacher_scores: Float[Array, "B C"] | None


class Shared(NamedTuple):
    """Sources and digests of all pairs, and the temperature, replicated on every device."""

    sources: Int[Array, "B"]
    digests: ItemDigests | None
    temperature: Float[Array, ""]


class Settings(NamedTuple):
    """Static arguments of the compiled loss."""

    budgets: tuple[Budget, ...]
    terms: Terms
    chunk: int | None


class Sums(NamedTuple):
    """Sums over queries for each group, [G], and the numbers of rows and of hard negatives that are not ranked, [2].

    None: not used.
    """

    loss: Array
    accuracy: Array
    self_distillation: Array | None
    symmetric: Array | None
    teacher: Array | None
    same: Array
    false_negatives: Array | None


def matryoshka_loss(
    query_BRD: Float[Array, "B Rq D"],
    document_BRD: Float[Array, "B Rc D"],
    negatives: Float[Array, "B K Rc D"] | None = None,
    groups: Sequence[Sequence[int]] = GROUPS,
    temperature: float = 0.03,
    normalization: str = "code",
    mesh: Mesh | None = None,
    chunk: int | None = None,
    negative_mask: Bool[Array, "B K"] | None = None,
    sources: Int[Array, "B"] | None = None,
    digests: ItemDigests | None = None,
    *,
    labels: Float[Array, "B C"] | None = None,
    teacher_scores: Float[Array, "B C"] | None = None,
    self_distillation: float = 0.0,
    self_distillation_temperature: float | None = None,
    symmetric: float = 0.0,
    false_negative_margin: float | None = None,
    teacher_weight: float = 0.0,
    teacher_loss: str = "kl",
    teacher_temperature: float = 1.0,
) -> tuple[Array, dict[str, Array]]:
    """Return the cross-entropy from queries to documents, for each group, averaged over the queries, and further weighted terms.

    A query ranks the positives of the whole global batch, its own at its own row, and its own hard negatives. The positives of all
    queries that are the same as it are right documents of it: it ranks no other row or hard negative that holds one of them.

    The loss of group g is CE_g + symmetric * S_g + self_distillation * KL(p_L || p_g) + teacher_weight * T_g:
      CE_g: the cross-entropy of the softmax of s_g / temperature over the documents that a query ranks.
      S_g: the same with the sides exchanged: each positive ranks the queries that rank it.
      p_g: the softmax of s_g / self_distillation_temperature over the documents that a query ranks; p_L is that of the largest
        group, without a gradient (Hinton et al. 2015, arXiv 1503.02531).
      T_g: the distance of the group's scores of a query's own C = 1 + K candidates, its positive and then its hard negatives, from
        a teacher's scores.

    Args:
      query_BRD: unit vectors, float32 or bfloat16; similarities and logits are float32.
      document_BRD: unit vectors of the positives.
      negatives: unit vectors of the hard negatives; None if there are none.
      groups: budgets (r_q, r_c) or (r_q, r_c, width); those of a width are nested, smallest first, and the last holds all others.
        With a width, vectors are cut to that many numbers and divided by their lengths. Vectors beyond the last group are not used.
      normalization: "code" divides the sum over groups by their number, "paper" does not.
      mesh: the batch is sharded over the axes `BATCH_AXES` and replicated over the others; None is one device.
      chunk: queries at a time; None chooses by memory. It does not change values.
      negative_mask: False marks hard negatives that are padding; None if there is no padding.
      sources: a number for each pair. A query does not rank positives of other sources; None if it ranks all.
      digests: says which items are the same; None if no two are.
      labels: non-negative weights of a query's candidates; divided by their sum, they are the target of its cross-entropy. A
        candidate above 0 is a right document. None: 1 for the positive, 0 for the others.
      teacher_scores: of a query's candidates, on any scale; NaN if missing. Without a score of its positive, a query does not take
        part in T_g.
      self_distillation: weight of the divergence of each smaller group from the largest.
      self_distillation_temperature: None: `temperature`. The term is multiplied by the square of their ratio, so that the size of
        its gradient hardly depends on it.
      symmetric: weight of the ranking of queries by positives.
      false_negative_margin: a document with s_L(q, d) > s_L(q, positive) + margin * r_q, a difference of mean cosines, is not
        ranked, except by accuracy (GISTEmbed, Solatorio 2024, arXiv 2402.16829). Candidates with a label above 0 stay. None: all
        documents are ranked.
      teacher_weight: weight of the distance from the teacher.
      teacher_loss: of logits s_g / temperature and teacher_scores / teacher_temperature, "kl" is KL(teacher || g) of their
        softmaxes, and "margin" the mean over hard negatives of the squared difference of their margins to the positive (Margin-MSE,
        Hofstätter et al. 2020, arXiv 2010.02666).

    Returns:
      The loss, and for each group "loss/r_q:r_c", which is CE_g, and "accuracy/r_q:r_c", float32 scalars; "loss/r_q:r_cxwidth"
      with a width. Accuracy is the share of queries with a right document that scores strictly above every wrong one: a tie is a
      miss. If vectors tie for a maximum, the gradient goes to the first. Terms in use are "self_distillation/r_q:r_c",
      "symmetric/r_q:r_c" and "teacher/r_q:r_c". With `digests`, also "same/documents" and "same/negatives", the numbers of other
      rows and of hard negatives of the batch that are not ranked because they hold a right document; with `false_negative_margin`,
      also "false_negatives/documents" and "false_negatives/negatives".

    Raises:
      UserError: the shapes do not match, an option has an unknown value, or the batch is not a multiple of the mesh's shards.
    """
    terms = Terms(
        self_distillation=self_distillation,
        self_distillation_temperature=self_distillation_temperature,
        symmetric=symmetric,
        false_negative_margin=false_negative_margin,
        teacher_weight=teacher_weight,
        teacher_loss=teacher_loss,
        teacher_temperature=teacher_temperature,
    )
    check_terms(terms)
    _check_options(normalization, temperature, chunk)
    pairs = _pairs(query_BRD, document_BRD, negatives, negative_mask, labels, teacher_scores, teacher_weight)
    sources = jnp.zeros(pairs.query.shape[:1], jnp.int32) if sources is None else jnp.asarray(sources)
    digests = None if digests is None else ItemDigests(*map(jnp.asarray, digests))
    _check_shapes(pairs, sources, digests)
    _check_mesh(len(pairs.query), mesh)
    budgets = validate_groups(groups, Budget(pairs.query.shape[1], *pairs.document.shape[1:]))
    r_q, r_c, _ = budgets[-1]
    pairs = pairs._replace(query=pairs.query[:, :r_q], document=pairs.document[:, :r_c], negatives=pairs.negatives[:, :, :r_c])
    shared = Shared(sources, digests, jnp.float32(temperature))
    means = _group_losses(pairs, shared, settings=Settings(budgets, terms, chunk), mesh=mesh)
    figures, losses_G = _figures(means, budgets, digests is not None), _weighted(means, terms)
    return losses_G.mean() if normalization == "code" else losses_G.sum(), figures


def _pairs(query, document, negatives, negative_mask, labels, teacher_scores, teacher_weight):
    """Return the arrays of pairs; the teacher's scores only if they have a weight."""
    query, document = jnp.asarray(query), jnp.asarray(document)
    negatives = (
        jnp.zeros((document.shape[0], 0, *document.shape[1:]), document.dtype) if negatives is None else jnp.asarray(negatives)
    )
    negative_mask = jnp.ones(negatives.shape[:2], bool) if negative_mask is None else jnp.asarray(negative_mask)
    if teacher_weight and teacher_scores is None:
        raise UserError(f"teacher_weight={teacher_weight}: the pairs have no teacher_scores; expected scores, or a weight of 0")
    labels = None if labels is None else jnp.asarray(labels)
    teacher_scores = jnp.asarray(teacher_scores) if teacher_weight else None
    return Pairs(query, document, negatives, negative_mask, labels, teacher_scores)


def _weighted(means, terms):
    """Return the weighted sum of the terms for each group."""
    losses_G = means.loss
    if means.self_distillation is not None:
        losses_G += terms.self_distillation * means.self_distillation
    if means.symmetric is not None:
        losses_G += terms.symmetric * means.symmetric
    if means.teacher is not None:
        losses_G += terms.teacher_weight * means.teacher
    return losses_G


def _figures(means, budgets, has_digests):
    """Return the metrics of `matryoshka_loss` by name."""
    figures = {"same/documents": means.same[0], "same/negatives": means.same[1]} if has_digests else {}
    if means.false_negatives is not None:
        documents, negatives = means.false_negatives
        figures |= {"false_negatives/documents": documents, "false_negatives/negatives": negatives}
    for name in ("loss", "accuracy", "self_distillation", "symmetric", "teacher"):
        values_G = getattr(means, name)
        if values_G is not None:
            figures |= {f"{name}/{budget}": value for budget, value in zip(budgets, values_G, strict=True)}
    return figures


def _check_shapes(pairs, sources, digests):
    query, document, negatives = pairs.query.shape, pairs.document.shape, pairs.negatives.shape
    shapes = f"query {query}, document {document}, negatives {negatives}"
    if len(query) != 3 or len(document) != 3 or len(negatives) != 4:
        raise UserError(f"matryoshka_loss: {shapes}: expected [B, R_q, D], [B, R_c, D] and [B, K, R_c, D]")
    if query[0] == 0 or query[0] != document[0] or query[2] != document[2]:
        raise UserError(f"matryoshka_loss: {shapes}: expected at least one pair of a query and a document, of one width")
    if (negatives[0], *negatives[2:]) != document:
        raise UserError(f"matryoshka_loss: {shapes}: expected negatives [B, K, R_c, D] with the documents' B, R_c and D")
    if pairs.negative_mask.shape != negatives[:2] or sources.shape != query[:1]:
        shapes = f"negative_mask {pairs.negative_mask.shape} and sources {sources.shape}"
        raise UserError(f"matryoshka_loss: {shapes}: expected {negatives[:2]} and {query[:1]}")
    candidates = negatives[0], 1 + negatives[1]
    for name, values in (("labels", pairs.labels), ("teacher_scores", pairs.teacher_scores)):
        if values is not None and values.shape != candidates:
            raise UserError(f"matryoshka_loss: {name} {values.shape}: expected {candidates}, the positive first")
    if digests is not None:
        check_digests(digests, negatives[:2])


def _check_mesh(pairs, mesh):
    if mesh is not None and pairs % batch_shards(mesh):
        raise UserError(
            f"batch of {pairs} pairs does not divide over {batch_shards(mesh)} shards of the mesh axes "
            f"{', '.join(BATCH_AXES)}; expected a multiple of that"
        )


def _check_options(normalization, temperature, chunk):
    if normalization not in ("code", "paper"):
        raise UserError(f"normalization={normalization!r}: expected 'code' (mean over groups) or 'paper' (sum)")
    if isinstance(temperature, int | float) and not temperature > 0:
        raise UserError(f"temperature={temperature}: expected a positive number")
    if chunk is not None and chunk < 1:
        raise UserError(f"chunk={chunk}: expected a positive number of queries")


@partial(jax.jit, static_argnames=("settings", "mesh"))
def _group_losses(pairs, shared, *, settings, mesh):
    """Return the means over the queries of the global batch, and its numbers of documents that are not ranked, as `Sums`."""
    if mesh is None:
        sums = _sums(pairs, shared, pairs.document, 0, settings, None)
    else:
        split, whole = PartitionSpec(BATCH_AXES), PartitionSpec()

        @partial(jax.shard_map, mesh=mesh, in_specs=(split, whole), out_specs=whole)
        def sums_of_shards(pairs, shared):
            first = jax.lax.axis_index(BATCH_AXES) * pairs.query.shape[0]
            with jax.named_scope("gather"):
                document_NRD = jax.lax.all_gather(pairs.document, BATCH_AXES, tiled=True)
            return jax.lax.psum(_sums(pairs, shared, document_NRD, first, settings, BATCH_AXES), BATCH_AXES)

        sums = sums_of_shards(pairs, shared)
    queries = pairs.query.shape[0]
    means = jax.tree.map(lambda sum_G: sum_G / queries, sums._replace(same=None, false_negatives=None))
    return means._replace(same=sums.same, false_negatives=sums.false_negatives)


def _sums(pairs, shared, document_NRD, first, settings, axes):
    """Return the sums over this device's queries. Their positives are documents first, first + 1, ... of all."""
    budgets, terms, chunk = settings
    temperature = shared.temperature
    target_BC = None if pairs.labels is None else targets(pairs.labels, pairs.negative_mask)
    ranked_BM, same_2 = ranked_documents(pairs.negative_mask, shared.sources, shared.digests, first, target_BC)
    positive_B = first + jnp.arange(pairs.query.shape[0])
    margins_GBM = budget_margins(pairs.query, document_NRD, pairs.negatives, positive_B, budgets, chunk)
    ranked_margins_GBM, false_2 = jnp.where(ranked_BM, margins_GBM, -jnp.inf), None
    hits_of_all = partial(hits, ranked_margins_GBM, positive_B, target_BC)
    if terms.false_negative_margin is not None:
        largest_margin = terms.false_negative_margin * budgets[-1].query
        pairs_of_all = document_NRD.shape[0]
        ranked_BM, false_2 = without_false_negatives(margins_GBM[-1], ranked_BM, target_BC, largest_margin, pairs_of_all)
        ranked_margins_GBM = jnp.where(ranked_BM, margins_GBM, -jnp.inf)
    losses_G = cross_entropies(ranked_margins_GBM, temperature, target_BC)
    distillation_G = symmetric_G = teacher_G = None
    if terms.self_distillation:
        distillation_G = self_distillation_losses(margins_GBM, ranked_BM, temperature, terms.self_distillation_temperature)
    if terms.symmetric:
        scores_GB = positive_scores(pairs.query, pairs.document, budgets, axes)
        symmetric_G = symmetric_losses(margins_GBM, scores_GB, ranked_BM, temperature, first, axes)
    if terms.teacher_weight:
        teacher_G = teacher_losses(margins_GBM, pairs.teacher_scores, pairs.negative_mask, temperature, terms)
    return Sums(losses_G, hits_of_all(), distillation_G, symmetric_G, teacher_G, same_2, false_2)
