"""Our model as a model of mteb that searches: `mteb.evaluate(Searcher(model, (16, 64)), tasks)`."""

import copy
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.budgets import search_name
from metaembed_jax.evaluation.mteb.items import Items
from metaembed_jax.evaluation.scoring import score_parts
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.stages import as_stages, largest_budget, search_in_stages
from metaembed_jax.model import MetaEmbed, from_parts


class Searcher:
    """mteb's `SearchProtocol`, scored by MaxSim at a budget or in stages.

    Candidates and queries are encoded once and kept until others come, for all searchers of `at`.

    Args:
      model: what encodes.
      budget: (r_q, r_c), or stages [(1, 1, 1000), (16, 64)]. All vectors by default.
      name: of the model, in mteb's results.
      revision: of the model, in mteb's results.
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
        vectors = model.config.vectors("query"), model.config.vectors("candidate")
        self.stages = as_stages(vectors if budget is None else budget, *vectors)
        self._largest = largest_budget([self.stages])
        self._held: dict[str, tuple[str, np.ndarray, np.ndarray]] = {}
        self._indexed: tuple | None = None

    def at(self, budget: Sequence) -> "Searcher":
        """The same searcher at another budget, within the largest of its own.

        Raises:
          UserError: it is not.
        """
        other = copy.copy(self)
        other.stages = as_stages(budget, *self._largest)
        return other

    @property
    def mteb_model_meta(self):
        """What mteb writes of this model."""
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

    def index(self, corpus, *, task_metadata, **_) -> None:
        """Encodes the candidates, unless they are held.

        Raises:
          UserError: names the item that cannot be encoded.
        """
        from mteb.types import PromptType

        items = Items(corpus, "candidate", task_metadata.get_modalities(PromptType.document), f"{task_metadata.name}, corpus")
        self._indexed = None
        self._indexed = (items.ids, *self._encoded(items))

    def search(self, queries, *, task_metadata, top_k: int, top_ranked: dict | None = None, **_) -> dict[str, dict[str, float]]:
        """The best of the indexed candidates, {query: {candidate: score}}, of `top_ranked` alone where it is given.

        Raises:
          UserError: as `index`.
        """
        from mteb.types import PromptType

        ids, rows, candidate_nRD = self._indexed
        asked = Items(queries, "query", task_metadata.get_modalities(PromptType.query), f"{task_metadata.name}, queries")
        query_QRD = from_parts(*self._encoded(asked), len(asked))
        left_out_QN = None if top_ranked is None else _left_out(asked.ids, ids, top_ranked)

        def score(budget: Budget, rows_QK: Int[np.ndarray, "Q K"] | None) -> Float[np.ndarray, "Q K"]:
            # Of all candidates in later stages too: what survives differs by query, and lies on several hosts.
            scores_QN = score_parts(query_QRD, rows, candidate_nRD, len(ids), budget)
            if left_out_QN is not None:
                scores_QN = np.where(left_out_QN, -np.inf, scores_QN)
            return scores_QN if rows_QK is None else np.take_along_axis(scores_QN, rows_QK, axis=1)

        found = zip(asked.ids, *(x.tolist() for x in search_in_stages(score, self.stages, top_k)), strict=True)
        return {
            query: {ids[row]: value for value, row in zip(scores, best, strict=True) if value > -np.inf}
            for query, scores, best in found
        }

    def _encoded(self, items: Items) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n R D"]]:
        """This host's rows and their vectors: those that are held, if they are of the same content."""
        fingerprint, held = items.fingerprint(), self._held.get(items.side)
        if held is None or held[0] != fingerprint:
            self._held.pop(items.side, None)  # before others take its place in memory
            budget = self._largest[0 if items.side == "query" else 1]
            try:
                rows, vectors = self.model.encode_part(items, items.side, budget=budget, progress=self.progress)
            except UserError as error:
                raise UserError(f"{items.name}: {error}") from None
            held = self._held[items.side] = fingerprint, rows, vectors
        return held[1:]


def _left_out(queries: Sequence[str], candidates: Sequence[str], top_ranked: dict[str, Sequence[str]]):
    """bool [Q, N]: which candidates a query does not ask about."""
    left_out, places = np.ones((len(queries), len(candidates)), bool), {name: row for row, name in enumerate(candidates)}
    for query, name in enumerate(queries):
        left_out[query, [places[candidate] for candidate in top_ranked.get(name, ()) if candidate in places]] = False
    return left_out
