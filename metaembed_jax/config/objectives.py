"""Objectives: settings with a loss and a count of its FLOPs. The loss of a step is the sum over all objectives.

A new objective is a class here and a field of `ObjectivesConfig`.

B pairs, K hard negatives a pair, C = 1 + K candidates, R vectors of an item, D width.
"""

import dataclasses
import functools
import operator
from typing import ClassVar, Literal, NamedTuple, Protocol

from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from metaembed_jax.config.section import NonNegativeNumber, Positive, PositiveNumber, Section, annotations
from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.all_states import TEMPERATURE, VectorCounts, all_states_loss
from metaembed_jax.late_interaction.groups import GROUPS, Budget
from metaembed_jax.late_interaction.right_documents import ItemDigests


class PairVectors(NamedTuple):
    """Unit vectors of a step's pairs, at the largest budget of all objectives.

    Attributes:
      negatives: None if no pair has any.
      negative_mask: false for missing negatives, which pad the array.
      sources: index of each pair's source. A query is scored against the positives of its source; None: against all positives.
      digests: says which items are the same; None if no two are.
      teacher_scores: of each positive, then of its negatives; NaN where missing. None if no objective reads them.
      labels: weights of right answers, of the same documents. None if no source of the run has any: 1, 0, ..., 0.
      counts: numbers of vectors of the items, if they differ; the others of an item are padding.
    """

    query_BRD: Float[Array, "B Rq D"]
    document_BRD: Float[Array, "B Rd D"]
    negatives: Float[Array, "B K Rd D"] | None
    negative_mask: Bool[Array, "B K"] | None
    sources: Int[Array, "B"] | None
    digests: ItemDigests | None
    teacher_scores: Float[Array, "B C"] | None = None
    labels: Float[Array, "B C"] | None = None
    counts: VectorCounts | None = None


class Objective(Protocol):
    """A term of the loss.

    Attributes:
      budgets: nested budgets, smallest first; the loss reads no vectors beyond the last one.
    """

    @property
    def budgets(self) -> tuple[Budget, ...]: ...

    def loss(self, vectors: PairVectors, mesh: Mesh | None) -> tuple[Array, dict[str, Array]]:
        """Return the loss of a step, a float32 scalar, and its figures by name."""
        ...

    def flops(self, pairs: int, documents: int, width: int) -> float:
        """Count the FLOPs of the forward pass, with `documents` for each query; the backward pass takes twice as many."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatryoshkaConfig(Section):
    """The Matryoshka loss: budgets trained together, each a prefix of the next."""

    KEY: ClassVar[str] = "config.objectives.matryoshka"

    # Budgets (r_q, r_c), or with a width (r_q, r_c, width); those of a width are nested, and the last holds all.
    groups: tuple[tuple[Positive, Positive] | tuple[Positive, Positive, Positive], ...] = GROUPS
    temperature: PositiveNumber = 0.03
    normalization: Literal["code", "paper"] = "code"  # code: mean over groups; paper: sum
    self_distillation: NonNegativeNumber = 0.0  # weight with which the largest group teaches each smaller one; 0: not used
    self_distillation_temperature: PositiveNumber | None = None  # of both; None: `temperature`
    symmetric: NonNegativeNumber = 0.0  # weight of the ranking of queries by positives; 0: not used
    false_negative_margin: NonNegativeNumber | None = None  # mean cosine above the positive's beyond which a document is not ranked
    teacher_weight: NonNegativeNumber = 0.0  # weight of the sources' teacher_scores; 0: not used
    teacher_loss: Literal["kl", "margin"] = "kl"  # of the candidates' distribution, or of their margins to the positive
    teacher_temperature: PositiveNumber = 1.0  # of the teacher; the model's is `temperature`

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The groups."""
        return tuple(Budget(*group) for group in self.groups)

    def loss(self, vectors: PairVectors, mesh: Mesh | None) -> tuple[Array, dict[str, Array]]:
        """Return `matryoshka_loss`, with the loss and the accuracy of each group."""
        from metaembed_jax.late_interaction.matryoshka import matryoshka_loss  # a config is read without it

        return matryoshka_loss(
            vectors.query_BRD,
            vectors.document_BRD,
            vectors.negatives,
            groups=self.groups,
            temperature=self.temperature,
            normalization=self.normalization,
            mesh=mesh,
            negative_mask=vectors.negative_mask,
            sources=vectors.sources,
            digests=vectors.digests,
            labels=vectors.labels,
            teacher_scores=vectors.teacher_scores,
            self_distillation=self.self_distillation,
            self_distillation_temperature=self.self_distillation_temperature,
            symmetric=self.symmetric,
            false_negative_margin=self.false_negative_margin,
            teacher_weight=self.teacher_weight,
            teacher_loss=self.teacher_loss,
            teacher_temperature=self.teacher_temperature,
        )

    def flops(self, pairs: int, documents: int, width: int) -> float:
        """Count the similarities of the largest group of each width, which include those of the smaller groups."""
        largest_of_width = {budget.width: budget for budget in self.budgets}
        products = sum(budget.query * budget.document * budget.numbers(width) for budget in largest_of_width.values())
        return 2.0 * pairs * documents * products


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllStatesConfig(Section):
    """The contrastive loss over all token states, of a model with `config.model.readout="states"`."""

    KEY: ClassVar[str] = "config.objectives.all_states"

    # All vectors of a query, and the number that those of a document are pooled to. The last pair is that of the loss: all of both.
    evaluated: tuple[tuple[Positive, Positive], ...] = ((16, 64),)
    temperature: PositiveNumber = TEMPERATURE  # of the mean over a query's vectors

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The evaluated budgets."""
        return tuple(Budget(*budget) for budget in self.evaluated)

    def loss(self, vectors: PairVectors, mesh: Mesh | None) -> tuple[Array, dict[str, Array]]:
        """Return `all_states_loss`, with its accuracy. Hard negatives that are labelled as right are not ranked."""
        assert vectors.counts is not None  # `RunConfig` checks that the readout is states
        mask_BK = vectors.negative_mask
        if vectors.labels is not None and mask_BK is not None:
            mask_BK &= ~(vectors.labels[:, 1:] > 0)
        return all_states_loss(
            vectors.query_BRD,
            vectors.document_BRD,
            vectors.negatives,
            vectors.counts,
            temperature=self.temperature,
            mesh=mesh,
            negative_mask=mask_BK,
            sources=vectors.sources,
            digests=vectors.digests,
        )

    def flops(self, pairs: int, documents: int, width: int) -> float:
        """Count the similarities of the longest items, since padding is computed too."""
        query_vectors, document_vectors = self.evaluated[-1]
        return 2.0 * pairs * documents * query_vectors * document_vectors * width


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectivesConfig(Section):
    """The objectives, by name, whose losses are added; None: not used."""

    KEY: ClassVar[str] = "config.objectives"

    matryoshka: MatryoshkaConfig | None = MatryoshkaConfig()
    all_states: AllStatesConfig | None = None

    def __post_init__(self):
        super().__post_init__()
        if not self.used():
            raise UserError("config.objectives: all are None; expected at least one, such as matryoshka=MatryoshkaConfig()")

    def used(self) -> dict[str, Objective]:
        """Return the objectives in use, by name."""
        objectives = {name: getattr(self, name) for name in annotations(type(self))}
        return {name: objective for name, objective in objectives.items() if objective is not None}

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The trained budgets, smallest first: those of the first objective."""
        return next(iter(self.used().values())).budgets

    @property
    def largest_budget(self) -> tuple[int, int]:
        """The most vectors of a query, and of a document, that a loss reads."""
        budgets = [budget for objective in self.used().values() for budget in objective.budgets]
        return max(budget.query for budget in budgets), max(budget.document for budget in budgets)

    @property
    def reads_teacher_scores(self) -> bool:
        """True if a loss reads the scores of a teacher."""
        return self.matryoshka is not None and self.matryoshka.teacher_weight > 0

    def loss(self, vectors: PairVectors, mesh: Mesh | None) -> tuple[Array, dict[str, Array]]:
        """Return the sum of the losses, and the figures of all objectives. With several, each loss is also "objective/NAME"."""
        terms = {name: objective.loss(vectors, mesh) for name, objective in self.used().items()}
        total, figures = functools.reduce(operator.add, (value for value, _ in terms.values())), {}
        for name, (value, objective_figures) in terms.items():
            figures |= objective_figures | ({f"objective/{name}": value} if len(terms) > 1 else {})
        return total, figures

    def flops(self, pairs: int, documents: int, width: int) -> float:
        """Count the FLOPs of the forward pass of all losses."""
        return sum(objective.flops(pairs, documents, width) for objective in self.used().values())
