"""Scores of documents whose vectors are spread over several hosts."""

import jax
import numpy as np
from jaxtyping import Float, Int

from metaembed_jax.hosts.shares import join_shares
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.maxsim import maxsim_on
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
