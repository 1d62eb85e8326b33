"""The interface of `Index` and `QdrantIndex` for those who search."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float

from metaembed_jax.model import MetaEmbed
from metaembed_jax.retrieval.hits import Hits


class Searchable(Protocol):
    """Items that can be searched."""

    @property
    def vectors(self) -> int:
        """Largest number of vectors that are stored of an item."""
        ...

    def __len__(self) -> int:
        """Return the number of items."""
        ...

    def check_model(self, model: MetaEmbed) -> None:
        """Check that this model encoded the items.

        Raises:
          UserError: another model did, or it is unknown which.
        """
        ...

    def search(
        self,
        query_QRD: Float[np.ndarray, "Q R D"],
        k: int | None = None,
        budget: Sequence | None = None,
        *,
        where: Mapping | None = None,
    ) -> Hits:
        """Return the k best items of each query.

        Args:
          query_QRD: unit vectors.
          k: results of a query.
          budget: (r_q, r_c), perhaps with a width, or stages; all vectors by default.
          where: search only items whose metadata match, as for `Index.search`.

        Raises:
          UserError: an argument is wrong.
        """
        ...
