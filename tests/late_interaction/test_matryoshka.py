from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from metaembed_jax.check.loss_reference import matryoshka
from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.budgets import budget_name
from metaembed_jax.late_interaction.groups import GROUPS, Budget, validate_groups
from metaembed_jax.late_interaction.matryoshka import matryoshka_loss
from metaembed_jax.late_interaction.right_documents import ItemDigests

TOLERANCE = 5e-5
GROUP_SETS = [
    GROUPS,
    ((1, 1),),
    ((16, 64),),
    ((3, 5), (3, 9), (7, 9), (15, 60)),  # one side alone grows; vectors left over
    ((1, 1, 8), (1, 1), (4, 8, 8), (8, 16, 8), (8, 16, 20), (15, 60)),  # three widths
    ((2, 4, 8), (4, 4, 8), (1, 2, 24), (4, 4, 24)),  # one width after the other; numbers left over
]


# The terms beside the cross-entropy, each with its settings.
TERMS = {
    "self_distillation": {"self_distillation": 0.5},
    "soft self_distillation": {"self_distillation": 2.0, "self_distillation_temperature": 0.1},
    "symmetric": {"symmetric": 0.7},
    "false negatives": {"false_negative_margin": 0.001},
    "teacher": {"teacher_weight": 0.8, "teacher_temperature": 2.0},
    "teacher's margins": {"teacher_weight": 0.01, "teacher_loss": "margin", "teacher_temperature": 0.5},
}
ALL_TERMS = {name: value for options in TERMS.values() for name, value in options.items()}


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def make_batch(batch, negatives, query_vectors=16, document_vectors=64, width=32, seed=0, widths=()):
    """Return vectors whose loss is of order 1 while logits reach hundreds.

    Every item is a small variation of one set of directions, so all scores are high and within a few temperatures of each
    other; a positive shares some of its query's variation. The two largest similarities of a maximum differ by more than float32
    resolves: closer ones could have another winner in float64, and another gradient.
    """
    rng = np.random.default_rng(seed)
    nearest = np.arange(document_vectors) % query_vectors
    while True:
        directions = rng.normal(size=(query_vectors, width))
        query = unit(directions + 0.1 * rng.normal(size=(batch, query_vectors, width)))
        near = unit(directions)[nearest]
        noise = partial(rng.normal, scale=0.04)
        positive = unit(near + 0.03 * (query[:, nearest] - near) + noise(size=(batch, *near.shape)))
        hard = unit(near + noise(size=(batch, negatives, *near.shape)))
        cuts = ([unit(x[..., :numbers]) for x in (query, positive, hard)] for numbers in {*widths, width})
        if min(closest_contest(*cut) for cut in cuts) > 1e-6:
            return query, positive, hard


def candidates(batch, negatives, seed=0):
    """Return labels and a teacher's scores of each query's candidates: some further positives, some missing scores."""
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random((batch, 1 + negatives)) < 0.4, rng.random((batch, 1 + negatives)), 0)
    labels[:, 0] = 1
    scores = 3 * rng.normal(size=(batch, 1 + negatives))
    scores[rng.random(scores.shape) < 0.2] = np.nan
    return {"labels": labels.astype(np.float32), "teacher_scores": scores.astype(np.float32)}


def closest_contest(query, positive, hard):
    """Return the smallest gap between a similarity and the maximum of those before it."""
    own = np.einsum("bid,bkjd->bikj", query, hard, dtype=np.float64)
    shared = np.einsum("bid,njd->binj", query, positive, dtype=np.float64)
    similarities = np.concatenate([shared, own], axis=2)
    before = np.maximum.accumulate(similarities, axis=-1)[..., :-1]
    return np.abs(similarities[..., 1:] - before).min(initial=np.inf)


def value_and_gradients(*vectors, **options):
    def loss(*vectors):
        return matryoshka_loss(*vectors, **options)

    return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(vectors))), has_aux=True))(*vectors)


def relative(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)


def assert_matches(vectors, groups, mesh=None, chunk=None, **options):
    """Compare the loss, its gradients and its figures with the reference's, and return the loss."""
    expected, expected_gradients, figures = matryoshka(*vectors, groups, **options)
    (value, metrics), gradients = value_and_gradients(*vectors, groups=groups, mesh=mesh, chunk=chunk, **options)
    assert relative(value, expected) < TOLERANCE
    for actual, reference in zip(gradients, expected_gradients, strict=True):
        assert actual.shape == reference.shape and relative(actual, reference) < TOLERANCE
    for documents, number in zip(("documents", "negatives"), figures.pop("false_negatives", ()), strict=False):
        assert metrics[f"false_negatives/{documents}"] == number
    for name, values in figures.items():
        for group, figure in zip(groups, values, strict=False):  # the largest group has no self-distillation
            assert relative(metrics[f"{name}/{budget_name(group)}"], figure) < TOLERANCE
    return expected


@pytest.mark.parametrize("options", [{}, *TERMS.values()], ids=["cross-entropy", *TERMS])
def test_reference_gradient_is_that_of_finite_differences(options):
    vectors = [x.astype(np.float64) for x in make_batch(4, 2, 3, 6, 5)]
    groups, step, rng = ((1, 2, 3), (2, 4), (3, 6)), 1e-6, np.random.default_rng(1)
    options = options | candidates(4, 2) | {"fixed": vectors}
    gradients = matryoshka(*vectors, groups, **options).gradients
    for k, gradient in enumerate(gradients):
        for _ in range(20):
            index = tuple(rng.integers(0, size) for size in gradient.shape)
            ends = []
            for sign in (1, -1):
                moved = [x.copy() for x in vectors]
                moved[k][index] += sign * step
                ends.append(matryoshka(*moved, groups, **options).loss)
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(gradient[index], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("groups", GROUP_SETS, ids=str)
def test_equals_the_reference(groups, negatives):
    batch = make_batch(12, negatives, widths=[group[2] for group in groups if len(group) > 2])
    scores = np.einsum("bid,njd->bnij", batch[0], batch[1]).max(3).sum(2)
    assert scores.max() / 0.03 > 300
    loss = assert_matches(batch, groups)
    assert 0.1 < loss < 10


@pytest.mark.parametrize("sharded", [False, True])
def test_masked_negatives_and_other_sources_do_not_count(sharded):
    batch, rng = make_batch(16, 3), np.random.default_rng(2)
    mask, sources = rng.random((16, 3)) < 0.5, rng.integers(0, 3, 16)
    assert mask.any() and not mask.all()
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "fsdp")) if sharded else None
    masked_by_source = assert_matches(batch, GROUPS, mesh=mesh, negative_mask=mask, sources=sources)
    masked = assert_matches(batch, GROUPS, mesh=mesh, negative_mask=mask)
    assert masked_by_source < masked < assert_matches(batch, GROUPS, mesh=mesh)


def check_terms(options, negatives, sharded=False):
    """Compare terms with the reference's where some negatives are padding, items are the same, and there are two sources."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "fsdp")) if sharded else None
    batch, rng = make_batch(16, negatives, 4, 8, widths=[12]), np.random.default_rng(4)
    items = digests_of(rng.integers(0, 12, 16), rng.integers(0, 12, 16), rng.integers(0, 20, (16, negatives)))
    facts = {"negative_mask": rng.random((16, negatives)) < 0.8, "digests": items, "sources": rng.integers(0, 2, 16)}
    assert_matches(batch, ((1, 1), (2, 4), (4, 8, 12), (4, 8)), mesh=mesh, **options, **facts, **candidates(16, negatives))


@pytest.mark.parametrize("options", TERMS.values(), ids=TERMS)
def test_terms_equal_the_reference(options):
    check_terms(options, 3)


@pytest.mark.parametrize("negatives", [0, 3])
def test_terms_over_a_mesh_equal_the_reference(negatives):
    check_terms(ALL_TERMS, negatives, sharded=True)


def digests_of(queries, positives, negatives):
    """Two words for each number; the first is the same for all."""
    return ItemDigests(*(np.stack([np.zeros_like(x), x], axis=-1).astype(np.int32) for x in (queries, positives, negatives)))


@pytest.mark.parametrize("sharded", [False, True])
def test_right_documents_of_a_query_are_not_its_negatives(sharded):
    batch, rng = make_batch(16, 3), np.random.default_rng(3)
    digests = digests_of(rng.integers(0, 9, 16), rng.integers(0, 9, 16), rng.integers(0, 12, (16, 3)))
    mask, sources = rng.random((16, 3)) < 0.7, rng.integers(0, 2, 16)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "fsdp")) if sharded else None
    masked = assert_matches(batch, GROUPS, mesh=mesh, negative_mask=mask, digests=digests)
    assert masked < assert_matches(batch, GROUPS, mesh=mesh, negative_mask=mask)
    assert_matches(batch, GROUPS, mesh=mesh, negative_mask=mask, sources=sources, digests=digests)
    different = digests_of(np.arange(16), np.arange(16), np.arange(16, 64).reshape(16, 3))
    value, metrics = matryoshka_loss(*batch, mesh=mesh, digests=different)
    assert value == matryoshka_loss(*batch, mesh=mesh)[0] and metrics["same/documents"] == metrics["same/negatives"] == 0


@pytest.mark.parametrize("sharded", [False, True])
def test_a_perfect_model_has_no_loss_whatever_pairs_share(sharded):
    """Queries 0 and 1 are the same and have two positives; 2 and 3 share one; 4's negative is its positive; 6 is pair 5 again."""
    queries, positives = np.array([0, 0, 1, 2, 3, 4, 4, 5]), np.array([0, 1, 2, 2, 3, 4, 4, 5])
    negatives = np.array([1, 9, 9, 2, 3, 9, 9, 9])[:, None]  # 9: padding
    topics = np.array([0, 0, 1, 1, 2, 3, 3, 4])
    directions = np.eye(8, dtype=np.float32)[:, None]
    vectors = directions[topics], directions[topics], directions[np.where(negatives == 9, 7, topics[:, None])]
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "fsdp")) if sharded else None
    options = {"groups": ((1, 1),), "mesh": mesh, "negative_mask": negatives < 9}
    value, metrics = matryoshka_loss(*vectors, digests=digests_of(queries, positives, negatives), **options)
    assert value < 1e-12 and metrics["accuracy/1:1"] == 1
    assert metrics["same/documents"] == 6 and metrics["same/negatives"] == 3
    value, metrics = matryoshka_loss(*vectors, **options)
    assert value > 0.5 and metrics["accuracy/1:1"] == 1 / 8


@pytest.mark.parametrize("chunk", [1, 2, 5, 12, 100])
def test_any_chunk_gives_the_same(chunk):
    assert_matches(make_batch(12, 1), GROUPS, chunk=chunk)


def test_paper_normalization_is_the_plain_sum():
    batch = make_batch(6, 1)
    assert_matches(batch, GROUPS, normalization="paper")
    code, paper = (matryoshka_loss(*batch, normalization=normalization)[0] for normalization in ("code", "paper"))
    assert paper == pytest.approx(len(GROUPS) * float(code), rel=1e-6)


def test_more_vectors_than_an_int8_counts():
    assert_matches(make_batch(5, 1, 4, 300, 16), ((1, 1), (2, 130), (4, 300)), chunk=2)


def test_no_negatives_can_be_left_out():
    query, positive, empty = make_batch(6, 0)
    assert matryoshka_loss(query, positive)[0] == matryoshka_loss(query, positive, empty)[0]


def test_ties_between_vectors_keep_the_value_and_give_the_gradient_to_the_first():
    rng = np.random.default_rng(0)
    shapes = (9, 16, 16), (9, 64, 16), (9, 2, 64, 16)
    # Similarities are multiples of 1/8, exact in float32: nearly every maximum is a tie.
    assert_matches([rng.choice([-0.25, 0.25], shape).astype(np.float32) for shape in shapes], GROUPS, chunk=4)


def test_a_tie_of_documents_is_a_miss():
    query = np.zeros((4, 16, 8), np.float32)
    query[..., 0] = 1
    document = np.repeat(query[:, :1], 64, 1)
    loss, metrics = matryoshka_loss(query, document)
    assert loss == pytest.approx(np.log(4))
    assert all(value == 0 for name, value in metrics.items() if name.startswith("accuracy"))


def test_duplicate_negative_is_a_miss_and_a_lone_pair_is_a_hit():
    query, positive, _ = make_batch(1, 0)
    loss, metrics = matryoshka_loss(query, positive)
    assert loss == 0 and metrics["accuracy/16:64"] == 1
    loss, metrics = matryoshka_loss(query, positive, positive[:, None])
    assert loss == pytest.approx(np.log(2), rel=1e-4)


def test_bfloat16_vectors_are_scored_in_float32():
    exact = make_batch(6, 1)
    batch = [jnp.asarray(x, jnp.bfloat16) for x in exact]
    expected, expected_gradients, _ = matryoshka(*[np.asarray(x, np.float32) for x in batch], GROUPS)
    (value, _), gradients = value_and_gradients(*batch, groups=GROUPS)
    assert value.dtype == jnp.float32 and relative(value, expected) < TOLERANCE
    assert relative(value, matryoshka(*exact, GROUPS).loss) < 1e-2
    for actual, reference in zip(gradients, expected_gradients, strict=True):
        assert actual.dtype == jnp.bfloat16 and relative(actual.astype(jnp.float32), reference) < 1e-2


@pytest.mark.parametrize("negatives", [0, 1, 3])
def test_mesh_equals_the_reference(negatives):
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    batch = [jax.device_put(x, sharding) for x in make_batch(12, negatives)]
    with jax.set_mesh(mesh):
        assert_matches(batch, GROUPS, mesh=mesh, chunk=2)


def test_memory_follows_the_chunk_and_keeps_no_similarities():
    batch, query_vectors, document_vectors, width = 64, 16, 64, 8
    shapes = [jax.ShapeDtypeStruct((batch, vectors, width), jnp.float32) for vectors in (query_vectors, document_vectors)]

    def naive(query, document):
        similarities = jnp.einsum("bid,njd->bnij", query, document)
        logits = jnp.stack([similarities[:, :, :r_q, :r_c].max(3).sum(2) / 0.03 for r_q, r_c in GROUPS])
        return -jnp.diagonal(jax.nn.log_softmax(logits), axis1=1, axis2=2).mean()

    def temporaries(loss):
        return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    similarities = 4 * batch * batch * query_vectors * document_vectors
    ours = temporaries(lambda query, document: matryoshka_loss(query, document, chunk=4)[0])
    assert ours < similarities / 3 < similarities < temporaries(naive)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (((2, 4), (1, 8)), "not nested"),
        (((2, 4), (2, 4)), "not nested"),
        (((4, 8), (8, 4)), "not nested"),
        (((1, 1), (17, 64)), "beyond the vectors"),
        (((1, 1), (16, 65)), "beyond the vectors"),
        (((0, 1),), "positive integers"),
        ((1, 2), "positive integers"),
        (((1, 1.5),), "positive integers"),
        ((), "at least one pair"),
    ],
)
def test_bad_groups_are_refused(groups, message):
    with pytest.raises(UserError, match=message):
        validate_groups(groups, Budget(16, 64, 32))
    with pytest.raises(UserError, match=message):
        matryoshka_loss(*make_batch(2, 0), groups=groups)


@pytest.mark.usefixtures("unchecked")
def test_other_bad_input_is_refused():
    query, positive, hard = make_batch(6, 1)
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    with pytest.raises(UserError, match="does not divide over 4 shards"):
        matryoshka_loss(query, positive, mesh=mesh)
    for vectors in ((query, positive[:5]), (query[0], positive), (query, positive, hard[:, :, :5]), (query[..., :3], positive)):
        with pytest.raises(UserError, match="matryoshka_loss: query"):
            matryoshka_loss(*vectors)
    for option in ({"normalization": "sum"}, {"temperature": 0}, {"chunk": 0}):
        with pytest.raises(UserError, match=next(iter(option))):
            matryoshka_loss(query, positive, **option)
