"""Exact MaxSim: s(q, d) = sum over i of the max over j of <q_i, d_j> (MetaEmbed, arXiv 2509.18095).

Q queries, N documents, R vectors of an item, D width of a vector, b queries of a block.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int8

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction import documents_tpu
from metaembed_jax.late_interaction.groups import Budget, validate_budget
from metaembed_jax.late_interaction.prefixes import unit_prefix
from metaembed_jax.precision import float32_einsum

# Vectors of each side that are scored at once, and numbers of the documents' vectors. The similarities stay in a CPU's cache, and
# the matmuls are still large (measured: 100 documents of 64 x 128 by 16 queries of 16; 28 documents of 64 x 3584).
DOCUMENT_VECTORS, DOCUMENT_NUMBERS = 6400, 6400 * 1024
QUERY_VECTORS = 256


def maxsim(
    query_QRD: Float[Array | np.ndarray, "Q Rq D"],
    document_NRD: Float[Array | np.ndarray, "N Rc D"] | Int8[Array | np.ndarray, "N Rc D"],
    budget: Sequence[int] | None = None,
    document_mask: Bool[Array, "N Rc"] | None = None,
    document_scale: Float[Array, "N Rc"] | None = None,
) -> Float[Array, "Q N"]:
    """Score every query against every document, in float32.

    Args:
      query_QRD: vectors of any float type.
      document_NRD: vectors of any float type, or int8.
      budget: (r_q, r_c) or (r_q, r_c, width), the vectors to use of each query and each document, from the first, and the numbers
        of each vector; None uses all.
      document_mask: False marks padding, which is never a maximum. A document of padding alone scores -inf.
      document_scale: a factor for each document vector, such as the scales of int8; not negative.

    Raises:
      UserError: the shapes do not match, or the budget is larger than the numbers of vectors.
    """
    query_QRD, document_NRD = _as_array(query_QRD, "query"), _as_array(document_NRD, "document")
    if query_QRD.ndim != 3 or document_NRD.ndim != 3 or query_QRD.shape[2] != document_NRD.shape[2]:
        raise UserError(
            f"maxsim: query {query_QRD.shape} and document {document_NRD.shape}: expected [items, vectors, D] with one D"
        )
    for name, given in (("document_mask", document_mask), ("document_scale", document_scale)):
        if given is not None and np.shape(given) != document_NRD.shape[:2]:
            raise UserError(f"maxsim: {name} {np.shape(given)}: expected {document_NRD.shape[:2]}, as the documents")
    queries, documents = query_QRD.shape[0], document_NRD.shape[0]
    available = Budget(query_QRD.shape[1], document_NRD.shape[1], query_QRD.shape[2])
    query_vectors, document_vectors, width = available if budget is None else validate_budget(budget, available)
    if queries == 0 or documents == 0:
        return jnp.zeros((queries, documents), jnp.float32)
    if 0 in (query_vectors, document_vectors, query_QRD.shape[2]):
        raise UserError(
            f"maxsim: query {query_QRD.shape} and document {document_NRD.shape}: expected at least one vector each, and D > 0"
        )
    if document_mask is not None:
        document_mask = jnp.asarray(document_mask, bool)[:, :document_vectors]
    if document_scale is not None:
        document_scale = jnp.asarray(document_scale, jnp.float32)[:, :document_vectors]
    query_QRD, document_NRD = query_QRD[:, :query_vectors], document_NRD[:, :document_vectors]
    if width not in (0, query_QRD.shape[2]):
        scaled_NRD = document_NRD if document_scale is None else document_NRD * document_scale[..., None]
        query_QRD, document_NRD, document_scale = unit_prefix(query_QRD, width), unit_prefix(scaled_NRD, width), None
    return _blocked(query_QRD, document_NRD, document_mask, document_scale)


def _as_array(given, name: str) -> Array:
    try:
        array = jnp.asarray(given)
    except (TypeError, ValueError) as error:
        raise UserError(f"maxsim: {name}: expected an array of numbers ({error})") from error
    if jnp.iscomplexobj(array):
        raise UserError(f"maxsim: {name} has complex numbers; expected real ones")
    return array


def maxsim_on(
    mesh: Mesh, query_QRD: Float[np.ndarray, "Q Rq D"], document_NRD: Float[np.ndarray, "N Rc D"], budget: Sequence[int]
) -> Float[np.ndarray, "Q N"]:
    """Score as `maxsim`, with the documents sharded over all devices of a mesh.

    A shard holds whole blocks of `maxsim`, so the scores are the same bits on any number of devices.

    Raises:
      UserError: as `maxsim`.
    """
    (queries, *_), (documents, *_) = query_QRD.shape, document_NRD.shape
    largest = Budget(query_QRD.shape[1], document_NRD.shape[1], query_QRD.shape[2])
    query_vectors, document_vectors, width = validate_budget(budget, largest)
    query_QRD = unit_prefix(query_QRD[:, :query_vectors], width)
    document_NRD = unit_prefix(document_NRD[:, :document_vectors], width)  # by the host: a device's sum may depend on the shape
    if not queries or not documents or mesh.size == 1:
        return np.asarray(maxsim(query_QRD, document_NRD))
    rows = _documents_at_once(*document_NRD.shape) * mesh.size
    document_NRD = np.pad(document_NRD, [(0, -documents % rows), (0, 0), (0, 0)])
    document_NRD = jax.device_put(document_NRD, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
    query_QRD = jax.device_put(query_QRD, NamedSharding(mesh, PartitionSpec()))
    return np.asarray(_split_over(mesh)(query_QRD, document_NRD, None, None))[:, :documents]


@cache
def _split_over(mesh: Mesh) -> Callable:
    """Return `_blocked` with the documents sharded over a mesh. Cached, so that equal shapes compile once for each mesh."""
    split, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    score = jax.shard_map(
        _blocked,
        mesh=mesh,
        in_specs=(whole, split, whole, whole),
        out_specs=PartitionSpec(None, mesh.axis_names),
        check_vma=False,  # the check does not look into kernels
    )
    return jax.jit(score)


@jax.jit
def _blocked(query_QRD, document_NRD, document_mask, document_scale):
    arrays = query_QRD, document_NRD, document_mask, document_scale
    blocks = documents_tpu.choose_blocks(query_QRD, document_NRD)
    if blocks is None:
        return _xla(*arrays)
    return jax.lax.platform_dependent(*arrays, tpu=partial(documents_tpu.score, blocks=blocks), default=_xla)


def _xla(query_QRD, document_NRD, document_mask=None, document_scale=None):
    queries, documents = query_QRD.shape[0], document_NRD.shape[0]
    at_once = min(max(QUERY_VECTORS // query_QRD.shape[1], 1), queries)
    query_QRD = jnp.pad(query_QRD, [(0, -queries % at_once), (0, 0), (0, 0)])
    query_blocks = query_QRD.reshape(-1, at_once, *query_QRD.shape[1:])
    size = _documents_at_once(*document_NRD.shape)

    def score_block(number, scores_QN):
        # The last block starts early enough to be full, because padding it would copy all documents.
        first = jnp.minimum(number * size, documents - size)
        block = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, size), (document_NRD, document_mask, document_scale))
        scores = jax.lax.map(lambda query_bRD: _score(query_bRD, *block), query_blocks)  # [query blocks, b, size]
        scores = scores.reshape(-1, size)[:queries]
        return jax.lax.dynamic_update_slice_in_dim(scores_QN, scores, first, axis=1)

    return jax.lax.fori_loop(0, -(-documents // size), score_block, jnp.zeros((queries, documents), jnp.float32))


def _documents_at_once(documents: int, vectors: int, width: int) -> int:
    return min(max(min(DOCUMENT_VECTORS, DOCUMENT_NUMBERS // width) // vectors, 1), documents)


def _score(query_QRD: Array, document_NRD: Array, document_mask: Array | None, document_scale: Array | None) -> Float[Array, "Q N"]:
    # Documents are the last axis, so that the maximum over j runs along whole rows of documents.
    similarity_QRJN = float32_einsum("qid,njd->qijn", query_QRD, document_NRD)
    if document_scale is not None:
        similarity_QRJN *= document_scale.T
    if document_mask is not None:
        similarity_QRJN = jnp.where(document_mask.T, similarity_QRJN, -jnp.inf)
    return similarity_QRJN.max(2).sum(1)
