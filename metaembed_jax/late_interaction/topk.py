"""The best candidates of all that lie on a mesh: every device scores its own exactly, then their best are merged.

Q queries, N candidates, R vectors of an item, D their width, k candidates that are kept.
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
    query_QRD: Float[Array, "Q Rq D"], candidate_NRD: Float[Array, "N Rc D"], k: int, mesh: Mesh
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """MaxSim scores, float32, and rows of the k best candidates of each query, best first; of ties, the first row.

    Args:
      query_QRD: whole on every device.
      candidate_NRD: the rows over all devices, in the order of the mesh.
      k: at most N.

    Raises:
      UserError: the devices do not divide N, or there is no k best.
    """
    candidates = candidate_NRD.shape[0]
    if candidates % mesh.size:
        raise UserError(f"top_k: {candidates} candidates do not divide over {mesh.size} devices")
    if not 1 <= k <= candidates:
        raise UserError(f"top_k: k={k} must be between 1 and the number of candidates, {candidates}")
    axes = tuple(mesh.axis_names)

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(axes)),
        out_specs=PartitionSpec(),
        check_vma=False,  # what is gathered is the same everywhere, which the check does not see
    )
    def merged(query_QRD, candidate_nRD):
        n = candidate_nRD.shape[0]
        scores, rows = jax.lax.top_k(maxsim(query_QRD, candidate_nRD), min(k, n))
        rows = rows + jax.lax.axis_index(axes) * n
        scores, rows = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in (scores, rows))
        scores, places = jax.lax.top_k(scores, k)
        return scores, jnp.take_along_axis(rows, places, axis=1)

    return merged(query_QRD, candidate_NRD)
