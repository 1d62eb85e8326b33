"""Scores of documents whose vectors are spread over several hosts."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from metaembed_jax.hosts.shares import join_shares
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.maxsim import maxsim, maxsim_on
from metaembed_jax.late_interaction.pooling import Pools, count_vectors, pooling_flops
from metaembed_jax.mesh import make_mesh


def score_shares(
    query_QRD: Float[np.ndarray, "Q Rq D"],
    rows: Int[np.ndarray, " n"],
    document_nRD: Float[np.ndarray, "n Rc D"],
    documents: int,
    budget: Budget,
) -> Float[np.ndarray, "Q N"]:
    """Return the MaxSim scores of all queries and all documents on every host. Each host scores its share on its devices.

    Args:
      rows, document_nRD: this host's share, of `MetaEmbed.encode_share`.
      documents: N, the number of all documents.
    """
    here = make_mesh(devices=jax.local_devices())
    return join_shares(rows, maxsim_on(here, query_QRD, document_nRD, budget).T, documents).T


class StateScores:
    """Scores of a model that reads all states: a budget is all vectors of a query, and the pooled vectors of a document.

    Args:
      query_QRD: zeros after a query's last vector.
      rows, document_nRD, documents: as for `score_shares`; zeros after a document's last vector.
    """

    def __init__(
        self,
        query_QRD: Float[np.ndarray, "Q Rq D"],
        rows: Int[np.ndarray, " n"],
        document_nRD: Float[np.ndarray, "n Rc D"],
        documents: int,
    ):
        self._query_QRD, self._rows, self._documents, self._most = query_QRD, rows, documents, document_nRD.shape[1]
        self._pools, self._query_vectors = Pools(document_nRD), float(count_vectors(query_QRD).mean())

    def score(self, budget: Budget) -> Float[np.ndarray, "Q N"]:
        """Return the scores of all queries and all documents on every host."""
        pooled_nRD = self._pools.pool(budget.document)
        scores_Qn = np.asarray(maxsim(self._query_QRD, pooled_nRD, budget, jnp.any(pooled_nRD, axis=2)))
        return join_shares(self._rows, scores_Qn.T, self._documents).T

    def used(self, budget: Budget) -> tuple[float, float]:
        """Return the mean numbers of vectors of a query and of a document."""
        return self._query_vectors, self._document_vectors(budget.document)

    def note(self) -> str:
        """Return a line about the numbers of vectors, and the cost of pooling them."""
        vectors, width = self._document_vectors(self._most), self._query_QRD.shape[2]
        return (
            f"vectors are all token states, {self._query_vectors:.1f} of a query and {vectors:.1f} of a document; fewer of a "
            f"document are clusters, for {pooling_flops(vectors, width):,.0f} FLOPs once; FLOPs and bytes are of mean numbers"
        )

    def _document_vectors(self, most: int) -> float:
        counts_n = count_vectors(self._pools.pool(most))
        return float(join_shares(self._rows, counts_n, self._documents).mean())
