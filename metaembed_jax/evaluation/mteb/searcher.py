"""A MetaEmbed model as a search model of mteb: `mteb.evaluate(Searcher(model, (16, 64)), tasks)`."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.mteb.items import TaskItems, items_of
from metaembed_jax.evaluation.mteb.scores import Scores, marked
from metaembed_jax.evaluation.scoring import score_shares
from metaembed_jax.hosts.shares import join_shares
from metaembed_jax.late_interaction.budgets import search_name
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.stages import as_stages, largest_budget, search_in_stages
from metaembed_jax.model import MetaEmbed


class Encoded(NamedTuple):
    """This host's rows of some items, and their vectors.

    Attributes:
      fingerprint: digest of the items' content.
    """

    fingerprint: str
    rows: Int[np.ndarray, " n"]
    vectors_nRD: Float[np.ndarray, "n R D"]


class Searcher:
    """mteb's `SearchProtocol`, scored by MaxSim at a budget or in stages.

    The vectors of the last documents and queries are kept, for this searcher and those of `at`.

    Args:
      model: encodes both.
      budget: (r_q, r_c), (r_q, r_c, width), or stages [(1, 1, 1000), (16, 64)]. All vectors by default.
      name: name of the model in mteb's results.
      revision: revision of the model in mteb's results.
      progress: show a bar.

    Raises:
      UserError: a budget beyond the model's.
    """

    def __init__(
        self,
        model: MetaEmbed,
        budget: Sequence | None = None,
        *,
        name: str = "model",
        revision: str | None = None,
        progress: bool = False,
    ):
        self.model, self.name, self.revision, self.progress = model, name, revision, progress
        self.stages = as_stages(model.largest_budget[:2] if budget is None else budget, model.largest_budget)
        self._largest = Budget(*largest_budget([self.stages]), model.dimension)
        self._held: dict[str, Encoded] = {}
        self._documents: tuple[Sequence[str], Encoded] | None = None

    def at(self, budget: Sequence) -> "Searcher":
        """Return this searcher at another budget.

        Raises:
          UserError: it is beyond the largest budget of this searcher.
        """
        other = copy.copy(self)
        other.stages = as_stages(budget, self._largest)
        return other

    @property
    def mteb_model_meta(self):
        """The metadata that mteb records of a model."""
        from mteb.models.model_meta import ModelMeta, ScoringFunction

        facts = dict(
            name=f"metaembed-jax/{self.name}",
            revision=self.revision,
            framework=["JAX"],
            similarity_fn_name=ScoringFunction.MAX_SIM,
            modalities=["text", "image"],
            model_type=["late-interaction"],
            experiment_kwargs={"budget": search_name(self.stages)},
        )
        return ModelMeta.create_empty({key: value for key, value in facts.items() if value is not None})

    def index(self, corpus: Any, *, task_metadata: Any, **_: Any) -> None:
        """Encode the documents, unless their vectors are kept.

        Raises:
          UserError: names the item that cannot be encoded.
        """
        items = items_of(corpus, "document", task_metadata)
        self._documents = None
        self._documents = items.ids, self._encoded(items)

    def search(
        self, queries: Any, *, task_metadata: Any, top_k: int, top_ranked: dict | None = None, **_: Any
    ) -> dict[str, dict[str, float]]:
        """Return the best of the indexed documents, {query: {document: score}}; with `top_ranked`, only of those it names.

        Raises:
          UserError: as `index`.
        """
        items = items_of(queries, "query", task_metadata)
        ids, score_all = self._scorer(items, top_ranked)

        def score(budget: Budget, rows_QK: Int[np.ndarray, "Q K"] | None) -> Float[np.ndarray, "Q K"]:
            # Later stages score all documents too: the survivors differ by query, and are spread over several hosts.
            scores_QN = score_all(budget)
            return scores_QN if rows_QK is None else np.take_along_axis(scores_QN, rows_QK, axis=1)

        scores_Qk, rows_Qk = search_in_stages(score, self.stages, top_k)
        rows: list[list[int]] = rows_Qk.tolist()
        return {
            query: {ids[row]: value for value, row in zip(scores, best, strict=True) if value > -np.inf}
            for query, scores, best in zip(items.ids, scores_Qk.tolist(), rows, strict=True)
        }

    def score(self, queries: Any, budget: Budget, *, task_metadata: Any, top_ranked: dict | None = None) -> Scores:
        """Score all of the indexed documents at a budget, within the largest of this searcher.

        Raises:
          UserError: as `index`.
        """
        items = items_of(queries, "query", task_metadata)
        ids, score = self._scorer(items, top_ranked)
        return Scores(items.ids, ids, score(budget))

    def _scorer(
        self, items: TaskItems, top_ranked: dict | None
    ) -> tuple[Sequence[str], Callable[[Budget], Float[np.ndarray, "Q N"]]]:
        """Return the ids of all documents, and their scores as a function of the budget; -inf for those not in `top_ranked`."""
        if self._documents is None:
            raise UserError(f"{items.name}: nothing is indexed; call index before search")
        ids, documents = self._documents
        queries = self._encoded(items)
        query_QRD = join_shares(queries.rows, queries.vectors_nRD, len(items))
        counted_QN = None if top_ranked is None else marked(items.ids, ids, top_ranked)

        def score(budget: Budget) -> Float[np.ndarray, "Q N"]:
            scores_QN = score_shares(query_QRD, documents.rows, documents.vectors_nRD, len(ids), budget)
            return scores_QN if counted_QN is None else np.where(counted_QN, scores_QN, -np.inf)

        return ids, score

    def _encoded(self, items: TaskItems) -> Encoded:
        """Return the vectors of items: the kept ones if the content is the same."""
        fingerprint, held = items.fingerprint(), self._held.get(items.side)
        if held is None or held.fingerprint != fingerprint:
            self._held.pop(items.side, None)  # frees memory before encoding
            budget = self._largest[0 if items.side == "query" else 1]
            try:
                rows, vectors_nRD = self.model.encode_share(items, items.side, budget=budget, progress=self.progress)
            except UserError as error:
                raise UserError(f"{items.name}: {error}") from None
            held = self._held[items.side] = Encoded(fingerprint, rows, vectors_nRD)
        return held
