"""Scores of candidates that lie on several hosts."""

import jax
import numpy as np
from jaxtyping import Float, Int

from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.maxsim import maxsim_on
from metaembed_jax.model import from_parts
from metaembed_jax.sharding import make_mesh


def score_parts(
    query_QRD: Float[np.ndarray, "Q Rq D"],
    rows: Int[np.ndarray, " n"],
    candidate_nRD: Float[np.ndarray, "n Rc D"],
    candidates: int,
    budget: Budget,
) -> Float[np.ndarray, "Q N"]:
    """MaxSim of all queries and all candidates, on every host: each scores its own candidates, on its devices.

    Args:
      rows, candidate_nRD: this host's part, of `MetaEmbed.encode_part`.
      candidates: N, how many there are in all.
    """
    here = make_mesh(devices=jax.local_devices())
    return from_parts(rows, maxsim_on(here, query_QRD, candidate_nRD, budget).T, candidates).T
