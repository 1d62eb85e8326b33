"""Our model as a model of mteb that searches: `mteb.evaluate(Searcher(model, (16, 64)), tasks)`."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.budgets import search_name
from metaembed_jax.evaluation.mteb.items import Items, items_of
from metaembed_jax.evaluation.scoring import score_parts
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.stages import as_stages, largest_budget, search_in_stages
from metaembed_jax.model import MetaEmbed, from_parts


class Scores(NamedTuple):
    """What candidates score.

    Attributes:
      queries, candidates: their ids.
      scores_QN: -inf where a query does not ask about a candidate.
    """

    queries: Sequence[str]
    candidates: Sequence[str]
    scores_QN: Float[np.ndarray, "Q N"]


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
        items = items_of(corpus, "candidate", task_metadata)
        self._indexed = None
        self._indexed = (items.ids, *self._encoded(items))

    def search(self, queries, *, task_metadata, top_k: int, top_ranked: dict | None = None, **_) -> dict[str, dict[str, float]]:
        """The best of the indexed candidates, {query: {candidate: score}}, of `top_ranked` alone where it is given.

        Raises:
          UserError: as `index`.
        """
        asked, ids = items_of(queries, "query", task_metadata), self._indexed[0]
        score_all = self._scorer(asked, top_ranked)

        def score(budget: Budget, rows_QK: Int[np.ndarray, "Q K"] | None) -> Float[np.ndarray, "Q K"]:
            # Of all candidates in later stages too: what survives differs by query, and lies on several hosts.
            scores_QN = score_all(budget)
            return scores_QN if rows_QK is None else np.take_along_axis(scores_QN, rows_QK, axis=1)

        found = zip(asked.ids, *(x.tolist() for x in search_in_stages(score, self.stages, top_k)), strict=True)
        return {
            query: {ids[row]: value for value, row in zip(scores, best, strict=True) if value > -np.inf}
            for query, scores, best in found
        }

    def score(self, queries, budget: Budget, *, task_metadata, top_ranked: dict | None = None) -> Scores:
        """What all of the indexed candidates score at a budget, within the largest of this searcher.

        Raises:
          UserError: as `index`.
        """
        asked = items_of(queries, "query", task_metadata)
        return Scores(asked.ids, self._indexed[0], self._scorer(asked, top_ranked)(budget))

    def _scorer(self, asked: Items, top_ranked: dict | None) -> Callable[[Budget], Float[np.ndarray, "Q N"]]:
        """Scores of all candidates at a budget, -inf for those that are not asked about."""
        ids, rows, candidate_nRD = self._indexed
        query_QRD = from_parts(*self._encoded(asked), len(asked))
        asked_QN = None if top_ranked is None else marked(asked.ids, ids, top_ranked)

        def score(budget: Budget) -> Float[np.ndarray, "Q N"]:
            scores_QN = score_parts(query_QRD, rows, candidate_nRD, len(ids), budget)
            return scores_QN if asked_QN is None else np.where(asked_QN, scores_QN, -np.inf)

        return score

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


def marked(queries: Sequence[str], candidates: Sequence[str], named: dict[str, Iterable[str]]) -> Bool[np.ndarray, "Q N"]:
    """Which candidates are named for a query, {query: candidates}; those that there are none of do not count."""
    marks_QN, places = np.zeros((len(queries), len(candidates)), bool), {name: row for row, name in enumerate(candidates)}
    for row_N, query in zip(marks_QN, queries, strict=True):
        row_N[[places[candidate] for candidate in named.get(query, ()) if candidate in places]] = True
    return marks_QN
