"""The TPU kernel, run by Pallas' interpreter against the definition in float64, and compiled by the TPU compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from metaembed_jax.check.references import maxsim_scores
from metaembed_jax.late_interaction import documents_tpu
from metaembed_jax.late_interaction.documents_tpu import choose_blocks
from metaembed_jax.late_interaction.maxsim import maxsim
from metaembed_jax.mesh import make_mesh
from metaembed_jax.planning.topology import topology

CASES = {  # Q, Rq, N, Rc, D, query, documents, masked
    "one vector each": (1, 1, 1, 1, 3, "float32", "float32", False),
    "one document": (9, 2, 1, 3, 8, "bfloat16", "bfloat16", True),
    "one vector": (2, 1, 150, 1, 128, "float32", "float32", False),
    "by document": (3, 2, 150, 4, 130, "float32", "float32", True),
    "by vector": (11, 3, 150, 5, 128, "bfloat16", "bfloat16", True),
    "int8": (3, 2, 40, 8, 128, "bfloat16", "int8", False),
    "int8, masked": (3, 2, 40, 3, 128, "float32", "int8", True),
    "types apart": (2, 2, 20, 2, 16, "float16", "bfloat16", False),
    "float32 by bfloat16": (3, 2, 40, 8, 128, "float32", "bfloat16", True),
}


def score(query, document, *factors, interpret=False):
    return documents_tpu.score(query, document, *factors, blocks=choose_blocks(query, document), interpret=interpret)


@pytest.fixture
def small_blocks(monkeypatch):
    """Limit blocks to 8 queries and 8 documents, and products to fewer documents than a block has."""
    monkeypatch.setattr(documents_tpu, "BLOCK_BYTES", dict.fromkeys(documents_tpu.BLOCK_BYTES, 1))
    monkeypatch.setattr(documents_tpu, "PRODUCT_NUMBERS", 3 * 4 * 128)


def noise(Q, Rq, N, Rc, D, query_type, document_type, masked):
    """Return queries, documents, masks (with larger vectors as padding), scales, and the documents in float64."""
    rng = np.random.default_rng(0)
    query, document = rng.normal(size=(Q, Rq, D)), rng.normal(size=(N, Rc, D))
    mask = np.arange(Rc) < np.linspace(0, Rc, N)[:, None] if masked else None
    scale = None
    if document_type == "int8":
        document, scale = np.round(document * 30).clip(-127, 127), rng.random((N, Rc), np.float32) / 300
        scale[0] = 0
    if masked:
        document[~mask] *= 4
    query, document = jnp.asarray(query, query_type), jnp.asarray(document, document_type)
    exact = np.float64(document) * (1 if scale is None else np.float64(scale)[:, :, None])
    return query, document, mask, scale, exact


def expected(query, exact, mask):
    if mask is None:
        return maxsim_scores(np.float64(query), exact)
    scores = np.full((len(query), len(exact)), -np.inf)
    for n in np.flatnonzero(mask.any(1)):
        scores[:, n] = maxsim_scores(np.float64(query), exact[n : n + 1, mask[n]])[:, 0]
    return scores


@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case, small_blocks):
    query, document, mask, scale, exact = noise(*CASES[case])
    scores = score(query, document, mask, scale, interpret=True)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, expected(query, exact, mask), rtol=1e-5, atol=1e-5)


def test_large_blocks():
    """A step is a whole tile, the last tile is not full, and the queries need two blocks."""
    rng = np.random.default_rng(0)
    query, document = (rng.normal(size=shape).astype(np.float32) for shape in ((130, 8, 4), (300, 2, 4)))
    blocks = choose_blocks(query, document)
    assert blocks.queries < 130 and blocks.step == blocks.tile == 256
    scores = score(query, document, interpret=True)
    expected = np.einsum("qid,njd->qnij", query, document, dtype=np.float64).max(3).sum(2)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


def test_ties_are_the_same_bits(small_blocks):
    """Equal documents in another row, step or tile have equal scores; equal queries, too."""
    rng = np.random.default_rng(0)
    query, document = (rng.normal(size=shape).astype(np.float32) for shape in ((9, 3, 16), (140, 4, 16)))
    document[[1, 70, 139]], query[8] = document[0], query[0]
    scores = np.asarray(score(query, document, interpret=True))
    assert (scores[:, [1, 70, 139]] == scores[:, :1]).all() and (scores[8] == scores[0]).all()


@pytest.mark.parametrize("width, platform, kernel", [(128, "tpu", True), (128, "cpu", False), (2**20, "tpu", False)])
def test_programs_with_the_kernel(width, platform, kernel):
    """Programs of a TPU have the kernel, unless a step would not fit."""
    query, document = (jax.ShapeDtypeStruct((n, 4, width), jnp.bfloat16) for n in (3, 20))
    mask = jax.ShapeDtypeStruct((20, 4), bool)
    program = jax.jit(lambda *arrays: maxsim(*arrays[:2], document_mask=arrays[2])).trace(query, document, mask)
    assert ("tpu_custom_call" in program.lower(lowering_platforms=(platform,)).as_text()) == kernel
    assert (choose_blocks(query, document) is not None) == (width == 128)


@pytest.fixture(params=["v5e:2x4", "v6e:2x4"])
def tpu_mesh(request):
    """A mesh of eight chips of a topology, without devices."""
    pytest.importorskip("libtpu")
    return make_mesh(2, 2, 2, devices=topology(request.param).devices)


absent = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # it holds no programs of absent chips


@absent
@pytest.mark.parametrize("query_type", ["bfloat16", "float32"])
def test_a_mesh_holds_no_similarities(tpu_mesh, query_type):
    Q, N, everywhere = 8, 100_000, PartitionSpec(tpu_mesh.axis_names)
    query, document = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(tpu_mesh, spec))
        for shape, dtype, spec in (((Q, 16, 3584), query_type, PartitionSpec()), ((N, 64, 3584), "bfloat16", everywhere))
    )
    specs, out = (PartitionSpec(), everywhere), PartitionSpec(None, tpu_mesh.axis_names)
    lowered = jax.jit(jax.shard_map(score, mesh=tpu_mesh, in_specs=specs, out_specs=out, check_vma=False)).lower(query, document)
    memory = lowered.compile().memory_analysis()
    scores, columns = Q * N // 8 * 4, 3 * 2 * 3584 * 128
    assert memory.temp_size_in_bytes <= 2 * (scores + columns)  # the similarities would be 1024 times the scores


@absent
def test_int8_with_scales_and_a_mask_on_a_mesh(tpu_mesh):
    N, everywhere, whole = 80_000, PartitionSpec(tpu_mesh.axis_names), PartitionSpec()
    inputs = (((1, 16, 3584), "bfloat16", whole), ((N, 64, 3584), "int8", everywhere))
    inputs += (((N, 64), "bool", everywhere), ((N, 64), "float32", everywhere))
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(tpu_mesh, spec)) for shape, dtype, spec in inputs]
    specs, out = tuple(spec for *_, spec in inputs), PartitionSpec(None, tpu_mesh.axis_names)
    on_mesh = jax.shard_map(score, mesh=tpu_mesh, in_specs=specs, out_specs=out, check_vma=False)
    memory = jax.jit(on_mesh).lower(*arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 3 * (N // 8) * 64 * 4  # factors; documents in bfloat16 would be 1792 times that


@absent
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("vectors", [1, 2, 3, 4, 24, 63])
def test_documents_are_read_in_place(dtype, vectors):
    """XLA's layout depends on the number of vectors; it would copy the documents if the kernel expected another one."""
    pytest.importorskip("libtpu")
    device = SingleDeviceSharding(topology("v5e:2x4").devices[0])
    query = jax.ShapeDtypeStruct((8, 4, 256), jnp.bfloat16, sharding=device)
    document = jax.ShapeDtypeStruct((100_001, vectors, 256), dtype, sharding=device)
    memory = jax.jit(score).lower(query, document).compile().memory_analysis()
    assert memory.temp_size_in_bytes < document.size * document.dtype.itemsize / 2
