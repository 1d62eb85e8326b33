"""The documents that a query ranks: right documents other than its own positive are not its negatives.

B pairs of the global batch, b of them on this device, K hard negatives of a pair, C = 1 + K candidates, M = B + K documents, W
words of a digest.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from metaembed_jax.errors import UserError


class ItemDigests(NamedTuple):
    """Digests of the items of pairs, W words each: items with the same words are the same item.

    Attributes:
      queries, positives, negatives: words of each pair's items.
    """

    queries: Int[Array, "B W"]
    positives: Int[Array, "B W"]
    negatives: Int[Array, "B K W"]


def check_digests(digests: ItemDigests, pairs_and_negatives: tuple[int, ...]) -> None:
    """Check the shapes of digests of B pairs with K hard negatives.

    Raises:
      UserError: they do not match (B, K).
    """
    shapes = [words.shape for words in digests]
    words = shapes[0][-1:]
    if shapes != [pairs_and_negatives[:1] + words, pairs_and_negatives[:1] + words, pairs_and_negatives + words]:
        raise UserError(
            f"matryoshka_loss: digests {shapes}: expected [B, W], [B, W] and [B, K, W] with B, K = {pairs_and_negatives}"
        )


def ranked_documents(
    mask_bK: Bool[Array, "b K"],
    source_B: Int[Array, " B"],
    digests: ItemDigests | None,
    first: int | Int[Array, ""],
    target_bC: Float[Array, "b C"] | None = None,
) -> tuple[Bool[Array, "b M"], Float[Array, "2"]]:
    """Return which documents a device's queries rank, and how many rows and hard negatives they do not, as right documents.

    Args:
      mask_bK: False marks hard negatives that are padding.
      source_B: a query ranks the positives of its source only.
      digests: says which items are the same; None if no two are.
      first: the queries are those of the pairs first, first + 1, ...
      target_bC: shares of a query's positive and its hard negatives in its target. Hard negatives above 0 are right documents, and
        the query ranks them, but no row that holds the same item. None: the positive alone.
    """
    queries = mask_bK.shape[0]

    def here(x_B):
        return jax.lax.dynamic_slice_in_dim(x_B, first, queries)

    of_source_bB = here(source_B)[:, None] == source_B
    if digests is None:
        return jnp.concatenate([of_source_bB, mask_bK], axis=1), jnp.zeros(2, jnp.float32)
    is_own_bB = jnp.arange(source_B.shape[0]) == first + jnp.arange(queries)[:, None]
    is_right_bB, is_right_bK = _right_documents(digests, here)
    if target_bC is not None:
        is_target_bK = mask_bK & (target_bC[:, 1:] > 0)
        holds_positive_bKB = _same(here(digests.negatives)[:, :, None], digests.positives)
        is_right_bB |= (holds_positive_bKB & is_target_bK[..., None]).any(axis=1)
        is_right_bK &= ~is_target_bK
    dropped_bB, dropped_bK = of_source_bB & is_right_bB & ~is_own_bB, mask_bK & is_right_bK
    same_2 = jnp.stack([dropped_bB.sum(), dropped_bK.sum()]).astype(jnp.float32)
    return jnp.concatenate([of_source_bB & ~dropped_bB, mask_bK & ~dropped_bK], axis=1), same_2


def _right_documents(digests, here):
    """Return which positives [b, B] and hard negatives [b, K] hold a positive of the query, or of one that is the same.

    Args:
      here: returns the rows of this device's queries.
    """
    query_BW, positive_BW, negative_BKW = digests
    pairs = positive_BW.shape[0]
    has_query_bB = _same(here(query_BW)[:, None], query_BW)
    # The number of the first row with the same positive. A sum over rows by it takes memory for b * B; a product of matrices would
    # take it for B * B.
    first_B = jnp.where(_same(positive_BW[:, None], positive_BW), jnp.arange(pairs), pairs).min(axis=1)
    is_right_Bb = jnp.zeros_like(has_query_bB.T).at[first_B].max(has_query_bB.T)
    holds_positive_bKB = _same(here(negative_BKW)[:, :, None], positive_BW)
    return is_right_Bb[first_B].T, (holds_positive_bKB & has_query_bB[:, None]).any(axis=2)


def _same(first, second):
    """Return which items have the same words; the last axis."""
    return (first == second).all(axis=-1)
