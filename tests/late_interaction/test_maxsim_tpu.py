"""The TPU kernel of tiles, run by Pallas' interpreter against the definition in float64, and compiled by the TPU compiler."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from metaembed_jax.check.references import maxsim_scores
from metaembed_jax.late_interaction import maxsim_tpu
from metaembed_jax.late_interaction.maxsim_tpu import choose_blocks, score
from metaembed_jax.planning.topology import topology

n = 128


class Case(NamedTuple):
    """Shapes and types of a search, and the vectors of a document that it uses."""

    Q: int
    Rq: int
    T: int
    R: int
    D: int
    used: int
    query: str
    documents: str


CASES = {
    "one vector of each": Case(1, 1, 1, 1, 3, 1, "float32", "float32"),
    "float32 by bfloat16": Case(3, 4, 2, 4, 256, 4, "float32", "bfloat16"),
    "a prefix, narrow": Case(9, 2, 3, 5, 130, 3, "bfloat16", "bfloat16"),
    "many tiles of one vector": Case(2, 3, 19, 2, 8, 1, "float32", "int8"),
    "more than a register of scales": Case(1, 2, 2, 20, 128, 12, "float32", "int8"),
    "float32": Case(3, 2, 2, 3, 128, 3, "float32", "float32"),
    "bfloat16 by float32": Case(2, 2, 1, 2, 128, 2, "bfloat16", "float32"),
}


def noise(case):
    """Return queries, vectors, scales and counts, and the scores in float64."""
    Q, Rq, T, R, D, used, query_type, document_type = case
    rng = np.random.default_rng(0)
    query, vectors = jnp.asarray(rng.normal(size=(Q, Rq, D)), query_type), rng.normal(size=(T, R, n, D))
    counts = rng.integers(0, R + 1, (T, n), np.int32)
    vectors[np.arange(R)[:, None] >= counts[:, None]] *= 4  # padding would win
    scales = rng.random((T, R, n), np.float32) / 100 if document_type == "int8" else None
    vectors = jnp.asarray(np.round(vectors * 30).clip(-127, 127) if document_type == "int8" else vectors, document_type)
    exact = np.float64(vectors) * (1 if scales is None else np.float64(scales)[..., None])
    expected = np.full((Q, T, n), -np.inf)
    for tile, document in np.argwhere(counts > 0):
        present = exact[tile, : min(used, counts[tile, document]), document]
        expected[:, tile, document] = maxsim_scores(np.float64(query), present[None])[:, 0]
    return query, vectors, scales, counts, expected.reshape(Q, -1)


def assert_exact(scores, expected):
    """Check scores; their error is relative to the largest, because terms of both signs cancel."""
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-6 * np.abs(expected[np.isfinite(expected)]).max())


@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case):
    *arrays, expected = noise(CASES[case])
    assert_exact(score(*arrays, CASES[case].used, interpret=True), expected)


@pytest.mark.parametrize("case", ["float32 by bfloat16", "a prefix, narrow", "more than a register of scales", "float32"])
def test_small_blocks(case, monkeypatch):
    """A step has one slab of a tile, and the queries need several blocks."""
    for name in ("BLOCK_BYTES", "CHUNK_NUMBERS", "QUERY_BYTES"):
        monkeypatch.setattr(maxsim_tpu, name, 1)
    *arrays, expected = noise(CASES[case])
    blocks = choose_blocks(*arrays[:2], CASES[case].used)
    assert blocks.tiles == blocks.slabs == blocks.queries == 1
    assert_exact(score(*arrays, CASES[case].used, interpret=True), expected)


def test_queries_of_several_blocks_are_whole_registers(monkeypatch):
    case = Case(19, 2, 1, 2, 8, 2, "bfloat16", "bfloat16")
    monkeypatch.setattr(maxsim_tpu, "ROWS", 32)
    *arrays, expected = noise(case)
    assert choose_blocks(*arrays[:2], case.used).queries == 16
    assert_exact(score(*arrays, case.used, interpret=True), expected)


def test_without_counts_all_vectors_are_scored():
    query, vectors, *_ = noise(CASES["float32 by bfloat16"])
    documents = np.float64(vectors).swapaxes(1, 2).reshape(-1, *vectors.shape[1::2])
    assert_exact(score(query, vectors, None, None, 4, interpret=True), maxsim_scores(np.float64(query), documents))


def test_float32_is_exact_in_parts():
    """A sum of three numbers in bfloat16, also where rounding to bfloat16 would carry."""
    numbers = np.float32([1 + 2**-8 - 2**-23, -3.3e5, 1e-30, 255.99998, 0])
    parts = [np.float64(part) for part in maxsim_tpu.split(jnp.asarray(numbers))]
    assert len(parts) == 3 and (sum(parts) == numbers).all()


def test_ties_are_the_same_bits():
    """Equal documents in another tile or row have equal scores; a query has the same scores alone and with others."""
    query, vectors, *_ = noise(CASES["float32 by bfloat16"])
    vectors = vectors.at[:, :, [5, 127]].set(vectors[:1, :, :1])
    scores = np.asarray(score(query, vectors, None, None, 4, interpret=True))
    assert (scores.reshape(3, 2, n)[:, :, [5, 127]] == scores[:, :1, None]).all()
    assert (np.asarray(score(query[1:2], vectors, None, None, 4, interpret=True)) == scores[1]).all()


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # it holds no programs of absent chips
@pytest.mark.parametrize("name", ["v5e:2x4", "v6e:2x4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("width, vectors, used", [(3584, 64, 64), (3584, 64, 1), (128, 16, 3), (8, 64, 16), (192, 3, 3)])
def test_tiles_are_read_in_place(name, dtype, width, vectors, used):
    """XLA's layout depends on the width; it would copy the documents if the kernel expected another one."""
    pytest.importorskip("libtpu")
    device = SingleDeviceSharding(topology(name).devices[0])
    shapes = [((8, 16, width), "float32"), ((50, vectors, n, width), dtype), ((50, vectors, n), "float32"), ((50, n), "int32")]
    query, documents, scales, counts = (jax.ShapeDtypeStruct(*shape, sharding=device) for shape in shapes)
    arrays = (query, documents, scales if dtype == "int8" else None, counts)
    memory = jax.jit(score, static_argnums=4).lower(*arrays, used).compile().memory_analysis()
    few = 50 * n * used * 4 * (dtype == "int8" and used < 8)  # scales that are copied
    assert memory.temp_size_in_bytes <= 2 * (few + 8 * 50 * n * 4 + 3 * 128 * max(width, 128) * 2)


def test_a_width_of_thousands_fits():
    for dtype in ("bfloat16", "int8"):
        for queries in (1, 8, 32):
            shapes = ((queries, 16, 8192), "float32"), ((9, 64, n, 8192), dtype)
            query, vectors = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
            assert choose_blocks(query, vectors, 64).vmem_bytes <= maxsim_tpu.VMEM_COUNTED
