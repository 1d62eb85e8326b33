"""The loss of a step is the sum of its objectives, and so are their FLOPs."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from metaembed_jax.check.network_cases import expected_loss
from metaembed_jax.config import MatryoshkaConfig, ObjectivesConfig, RunConfig, with_keys
from metaembed_jax.config.keys import apply_flags
from metaembed_jax.config.objectives import PairVectors
from metaembed_jax.config.record import read_section, to_record
from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.matryoshka import matryoshka_loss
from metaembed_jax.training.step import gather

FIRST = MatryoshkaConfig(groups=((1, 1), (2, 4)))
SECOND = MatryoshkaConfig(groups=((3, 3),), temperature=0.5, normalization="paper")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoObjectives(ObjectivesConfig):
    second: MatryoshkaConfig | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(RunConfig):
    objectives: TwoObjectives = TwoObjectives()


def vectors():
    random = np.random.default_rng(0)
    query, document = (random.normal(size=(6, count, 8)).astype(np.float32) for count in (3, 4))
    return PairVectors(*(x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, document)), None, None, None, None)


def test_the_loss_is_the_sum_of_all_that_are_set():
    both, pairs = TwoObjectives(matryoshka=FIRST, second=SECOND), vectors()
    loss, figures = both.loss(pairs, None)
    first, _ = matryoshka_loss(pairs.query_BRD, pairs.document_BRD, groups=FIRST.groups)
    second, _ = matryoshka_loss(pairs.query_BRD, pairs.document_BRD, groups=SECOND.groups, temperature=0.5, normalization="paper")
    assert float(loss) == pytest.approx(float(first + second), rel=1e-6)
    assert figures["objective/matryoshka"] == first and figures["objective/second"] == second
    assert figures.keys() >= {"loss/1:1", "accuracy/2:4", "loss/3:3"}
    assert both.largest_budget == (3, 4) and [budget.sizes for budget in both.budgets] == [(1, 1), (2, 4)]
    assert both.flops(6, 7, 8) == 2 * 6 * 7 * 8 * (2 * 4 + 3 * 3)


def test_keys_of_terms_reach_the_loss():
    pairs = vectors()
    negatives = np.roll(pairs.document_BRD, 1, axis=0)[:, None]
    labels = np.array([[1, 0.5]] * 6, np.float32)
    pairs = pairs._replace(negatives=negatives, labels=labels, teacher_scores=np.array([[1, 0]] * 6, np.float32))
    keys = {
        "self_distillation": 0.5,
        "self_distillation_temperature": 0.2,
        "symmetric": 0.5,
        "false_negative_margin": 0.01,
        "teacher_weight": 0.5,
        "teacher_loss": "margin",
        "teacher_temperature": 2.0,
    }
    loss, figures = dataclasses.replace(FIRST, **keys).loss(pairs, None)
    arrays = {"labels": labels, "teacher_scores": pairs.teacher_scores}
    expected, _ = matryoshka_loss(pairs.query_BRD, pairs.document_BRD, negatives, groups=FIRST.groups, **arrays, **keys)
    assert loss == expected and loss != (figures["loss/1:1"] + figures["loss/2:4"]) / 2
    assert figures.keys() >= {"self_distillation/1:1", "symmetric/2:4", "teacher/2:4", "false_negatives/documents"}
    with pytest.raises(UserError, match="teacher_weight=0.5: the pairs have no teacher_scores"):
        dataclasses.replace(FIRST, **keys).loss(pairs._replace(teacher_scores=None), None)


def test_groups_of_several_widths():
    flag = {"objectives.matryoshka.groups": "((1,1,4),(2,4,4),(2,4))"}
    objectives, pairs = apply_flags(Run(), flag).objectives, vectors()
    assert read_section(TwoObjectives, to_record(objectives), "config.objectives") == objectives
    loss, figures = objectives.loss(pairs, None)
    groups = [(1, 1, 4), (2, 4, 4), (2, 4)]
    assert loss == matryoshka_loss(pairs.query_BRD, pairs.document_BRD, groups=groups)[0]
    assert {"loss/1:1x4", "accuracy/2:4x4", "loss/2:4"} <= figures.keys()
    assert objectives.flops(6, 7, 8) == 2 * 6 * 7 * (2 * 4 * 4 + 2 * 4 * 8)
    with pytest.raises(UserError, match="has a width beyond"):
        matryoshka_loss(pairs.query_BRD, pairs.document_BRD, groups=[(1, 1, 9)])


def test_terms_of_vectors_in_packed_rows():
    """Items start anywhere in three rows; the gradient of the rows is that of the reference, and 0 between the items."""
    terms = {"symmetric": 0.5, "self_distillation": 0.5, "false_negative_margin": 0.05}
    objectives = ObjectivesConfig(matryoshka=MatryoshkaConfig(groups=((1, 1, 4), (3, 5, 4), (3, 5)), temperature=0.1, **terms))
    random = np.random.default_rng(0)
    rows_nVD = random.normal(size=(3, 42, 8)).astype(np.float32)
    rows_nVD /= np.linalg.norm(rows_nVD, axis=2, keepdims=True)
    starts_N = 7 * random.permutation(18)
    batch = types.SimpleNamespace(queries=starts_N[:6], documents=starts_N[6:])

    def loss(rows_nVD):
        vectors_TD = rows_nVD.reshape(-1, 8)
        query_BRD, document_NRD = gather(vectors_TD, batch.queries, 3), gather(vectors_TD, batch.documents, 5)
        negatives = document_NRD[6:].reshape(6, 1, 5, 8)
        return objectives.loss(PairVectors(query_BRD, document_NRD[:6], negatives, None, None, None), None)

    (value, figures), gradient_nVD = jax.value_and_grad(loss, has_aux=True)(rows_nVD)
    expected, losses, expected_gradient_nVD = expected_loss(objectives, batch, rows_nVD.astype(np.float64))
    assert figures["false_negatives/documents"] > 0
    assert float(value) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose([figures[f"loss/{group}"] for group in objectives.budgets], losses, rtol=1e-5)
    assert np.linalg.norm(gradient_nVD - expected_gradient_nVD) < 5e-5 * np.linalg.norm(expected_gradient_nVD)


def test_one_objective_is_the_loss_alone():
    loss, figures = TwoObjectives(matryoshka=FIRST).loss(vectors(), None)
    expected, theirs = FIRST.loss(vectors(), None)
    assert loss == expected and figures.keys() == theirs.keys()
    with pytest.raises(UserError, match="config.objectives: all are None"):
        TwoObjectives(matryoshka=None)


def test_a_key_sets_an_objective_that_was_not_used():
    expected = TwoObjectives(second=MatryoshkaConfig(temperature=0.5))
    assert with_keys(TwoObjectives(), {"second.temperature": 0.5}) == expected
    assert apply_flags(Run(), {"objectives.second.temperature": "0.5"}).objectives == expected


def test_runs_from_before_an_objective_did_not_use_it():
    record = to_record(TwoObjectives())
    assert record.pop("second", 0) is None
    assert read_section(TwoObjectives, record, "config.objectives") == TwoObjectives()
    with pytest.raises(UserError, match="config.objectives.matryoshka is missing"):
        read_section(TwoObjectives, {"second": to_record(SECOND)}, "config.objectives")
