"""Exact search of documents that are sharded over a mesh: every device finds its best documents, and the results are merged.

Q queries, N documents, R vectors of an item, D width of a vector, k results.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.maxsim import maxsim


@partial(jax.jit, static_argnames=("k", "mesh"))
def top_k(
    query_QRD: Float[Array, "Q Rq D"], document_NRD: Float[Array, "N Rc D"], k: int, mesh: Mesh
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """Return MaxSim scores, float32, and rows of the k best documents of each query, best first; of ties, the first row.

    Args:
      query_QRD: replicated on every device.
      document_NRD: sharded by documents over all devices, in the order of the mesh.
      k: at most N.

    Raises:
      UserError: N is not a multiple of the number of devices, or k is not between 1 and N.
    """
    documents = document_NRD.shape[0]
    if documents % mesh.size:
        raise UserError(f"top_k: {documents} documents do not divide over {mesh.size} devices; expected a multiple of that")
    if not 1 <= k <= documents:
        raise UserError(f"top_k: k={k}: expected 1 to {documents}, the number of documents")
    axes = tuple(mesh.axis_names)

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(axes)),
        out_specs=PartitionSpec(),
        check_vma=False,  # the check does not see that gathered arrays are replicated
    )
    def merged(query_QRD, document_nRD):
        n = document_nRD.shape[0]
        scores, rows = jax.lax.top_k(maxsim(query_QRD, document_nRD), min(k, n))
        rows = rows + jax.lax.axis_index(axes) * n
        scores, rows = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in (scores, rows))
        scores, columns = jax.lax.top_k(scores, k)
        return scores, jnp.take_along_axis(rows, columns, axis=1)

    return merged(query_QRD, document_NRD)
