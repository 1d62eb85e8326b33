"""Searches of an index against their definition in float64."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import metaembed_jax as me
from metaembed_jax.late_interaction import engine
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.mesh import make_mesh
from metaembed_jax.retrieval import checksummed_files
from metaembed_jax.retrieval import search as module
from metaembed_jax.retrieval.ingest import to_int8
from metaembed_jax.retrieval.manifest import DTYPES
from metaembed_jax.retrieval.search import Searcher
from metaembed_jax.retrieval.tile_reader import TileReader
from tests.retrieval import reference
from tests.retrieval.reference import exact, unit

ONE = make_mesh(devices=jax.devices()[:1])


def assert_results(index, queries, items, k, budget, stages):
    scores, ids = index.search(queries, k=k, budget=budget)
    expected_scores, expected_rows = reference.search(queries, items, k, stages)
    assert scores.dtype == np.float32 and ids.tolist() == expected_rows.astype(str).tolist()
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**32 - 1), st.integers(0, 5), st.integers(1, 40), st.integers(1, 9), st.booleans(), st.booleans(), st.booleans()
)
def test_equal_to_the_definition(seed, queries, documents, vectors, ties, ragged, staged):
    rng = np.random.default_rng(seed)
    make = exact if ties else unit
    query, document = make(rng, queries, 3, 16), make(rng, documents, vectors, 16)
    items = [vectors_RD[: rng.integers(1, vectors + 1)] for vectors_RD in document] if ragged else document
    largest = max(map(len, items))
    widths = [0, 1, 4, 16] if ties else [0, 3, 8, 16]  # powers of four keep ties exact
    stages = [(int(rng.integers(1, 4)), int(rng.integers(1, largest + 1)), int(rng.choice(widths))) for _ in range(3)]
    if staged:
        stages = [(*stages[0], documents), (*stages[1], max(documents // 2, 1)), stages[2]]
    k = int(rng.integers(1, min([documents, *(stage[3] for stage in stages[:-1])] if staged else [documents]) + 1))
    index = me.Index.build(list(items) if ragged else items, dtype="float32", mesh=ONE)
    assert_results(index, query, items, k, stages if staged else stages[0], stages if staged else stages[:1])


def test_blocks_steps_and_queries_that_do_not_divide(monkeypatch):
    for name, value in {"BLOCK_NUMBERS": 1, "SURVIVOR_NUMBERS": 1, "QUERY_VECTORS": 32}.items():
        monkeypatch.setattr(module, name, value)
    sizes = {"QUERY_VECTORS": 8, "DOCUMENTS_FIRST": range(5), "DOCUMENT_VECTORS": 1, "MERGED_DOCUMENTS": 128, "SURVIVOR_VECTORS": 8}
    for name, value in sizes.items():
        monkeypatch.setattr(engine, name, value)
    jax.clear_caches()
    monkeypatch.setattr(checksummed_files, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(checksummed_files, "READS_BEFORE_RELEASE", 3)
    rng = np.random.default_rng(0)
    query, document = exact(rng, 21, 4, 16), exact(rng, 533, 4, 16)
    index = me.Index.build(document[:150], map(str, range(150)), dtype="float32", mesh=ONE)
    index.add(document[150:151], ["150"])
    index.add(document[151:], map(str, range(151, 533)))
    for resident in (False, True):
        loaded = me.Index.load(index.folder, mesh=ONE, resident=resident)
        for stages in ([(3, 3)], [(1, 1, 200), (2, 4, 30), (4, 3)], [(1, 1, 4, 200), (2, 4, 30), (4, 3, 1)]):
            assert_results(loaded, query, document, 20, stages, stages)
    jax.clear_caches()


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("mesh", [ONE, make_mesh()], ids=["one device", "all devices"])
def test_scores_of_chosen_documents(monkeypatch, mesh, resident):
    monkeypatch.setattr(module, "QUERY_VECTORS", 16)
    rng = np.random.default_rng(0)
    query, document = unit(rng, 21, 4, 16), unit(rng, 300, 5, 16)
    index = me.Index.build(document[:150], map(str, range(150)), dtype="float32", mesh=ONE)
    index.add(document[150:], map(str, range(150, 300)))
    searcher = me.Index.load(index.folder, mesh=mesh, resident=resident)._searcher
    positions = np.sort(rng.permuted(np.tile(np.arange(300), (21, 1)), axis=1)[:, :3], axis=1)
    for budget in (Budget(4, 5), Budget(2, 3), Budget(3, 2, 8)):
        scores = searcher.score(query, positions, budget)
        cut = [me.unit_prefix(x[:, :count], budget.width) for x, count in zip((query, document), budget[:2], strict=True)]
        expected = np.einsum("qid,njd->qnij", *cut).max(3).sum(2)
        np.testing.assert_allclose(scores, np.take_along_axis(expected, positions, axis=1), rtol=1e-5, atol=1e-5)
    assert searcher.score(query[:0], positions[:0], Budget(1, 1)).shape == (0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_devices_and_residents_find_the_same_bits(dtype):
    rng = np.random.default_rng(1)
    query, document = unit(rng, 5, 4, 16), unit(rng, 333, 9, 16)
    document[200] = document[3]
    ragged = [vectors_RD[: 1 + n % 9] for n, vectors_RD in enumerate(document)]
    for items in (document, ragged):
        index = me.Index.build(items, dtype=dtype, mesh=ONE)
        index.add(items[:5], [f"again {n}" for n in range(5)])
        index.delete(["7", "again 1"])
        for resident, mesh in ((False, make_mesh(2, 2, 2)), (True, make_mesh(2, 2, 2)), (True, ONE)):
            other = me.Index.load(index.folder, mesh=mesh, resident=resident)
            for budget in ((3, 7), [(1, 1, 50), (4, 9)], (4, 9, 5), [(1, 1, 4, 50), (4, 9, 12)]):
                for expected, actual in zip(index.search(query, 20, budget), other.search(query, 20, budget), strict=True):
                    np.testing.assert_array_equal(actual, expected)


def test_padding_never_wins():
    far = -np.ones((1, 1, 4), np.float32) / 2  # a vector of zeros would score higher
    items = [far[0], np.concatenate([far[0]] * 3)]
    for dtype in ("float32", "int8"):
        scores, ids = me.Index.build(items, dtype=dtype, mesh=ONE).search(-far, k=2)
        np.testing.assert_allclose(scores, -1, rtol=1e-5)
        assert ids.tolist() == [["0", "1"]]


def test_bfloat16_and_int8_are_scored_as_they_are_stored():
    rng = np.random.default_rng(2)
    query, document = unit(rng, 3, 4, 32), unit(rng, 60, 9, 32)
    rounded = document.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert_results(me.Index.build(document, mesh=ONE), query, rounded, 60, (4, 9), [(4, 9)])
    numbers, scales = to_int8(document)
    stored = numbers * scales.astype(float)[..., None]
    index = me.Index.build(document, dtype="int8", mesh=ONE)
    for budget in ((3, 7), (3, 7, 16)):
        assert_results(index, query, stored, 60, budget, [budget])


@pytest.mark.parametrize("resident", [False, True])
def test_a_chip_that_keeps_int8_has_the_scales_of_prefixes_alone(monkeypatch, resident):
    """Other devices than CPUs keep int8 and its scales; a width has scales of its own, and zeros stay zeros."""
    rng = np.random.default_rng(11)
    query, document = unit(rng, 3, 4, 32), unit(rng, 60, 9, 32)
    document[7] = 0
    document[7, :, -1] = 1  # all its prefixes are zeros
    numbers, scales = to_int8(document)
    index = me.Index.build(document, dtype="int8", mesh=ONE)
    create = TileReader.__init__

    def keep_int8(reader, *arguments):
        create(reader, *arguments)
        reader._is_widened, reader.dtype, reader._has_scales = False, np.dtype(np.int8), True

    monkeypatch.setattr(TileReader, "__init__", keep_int8)
    index = me.Index.load(index.folder, mesh=ONE, resident=resident)
    for stages in ([(3, 7, 8)], [(1, 1, 8, 50), (4, 9)], [(2, 9, 50), (4, 9, 20, 40), (4, 9, 8)]):
        assert_results(index, query, numbers * scales.astype(float)[..., None], 20, stages, stages)


@pytest.mark.parametrize("width", [1, 8, 100, 300])
def test_int8_is_the_nearest_of_its_kind(width):
    """Each vector separately, against the definition in float64."""
    document = unit(np.random.default_rng(7), 30, 5, width)
    document[2, 3] = 0
    numbers, scales = to_int8(document)
    assert numbers.dtype == np.int8 and scales.dtype == np.float32 and scales[2, 3] == 0 and not numbers[2, 3].any()
    stored = numbers * scales.astype(float)[..., None]
    np.testing.assert_allclose(np.sum(stored * document, -1), np.sum(document.astype(float) ** 2, -1), rtol=1e-6)
    for vector, ours in zip(document.reshape(-1, width).astype(float), stored.reshape(-1, width), strict=True):
        if vector.any():
            scaled = [vector / np.abs(vector).max() * largest for largest in range(127, 127 - min(max(256 // width, 1), 32), -1)]
            rounded = [np.round(x) * (vector @ vector) / (np.round(x) @ vector) for x in scaled]
            error = min(np.linalg.norm(x - vector) for x in rounded)
            np.testing.assert_allclose(
                np.linalg.norm(ours - vector), error, rtol=2e-2, atol=1e-7
            )  # lengths in float32 are no more exact


def test_deleted_items_are_not_found():
    rng = np.random.default_rng(3)
    query, document = unit(rng, 3, 2, 8), unit(rng, 30, 5, 8)
    index = me.Index.build(document, dtype="float32", mesh=ONE)
    deleted = ["3", "29", "0"]
    index.delete(deleted)
    rest = [n for n in range(30) if str(n) not in deleted]
    for _ in range(2):
        for stages in ([(2, 5)], [(1, 1, 100), (2, 5)]):
            scores, ids = index.search(query, 27, stages)
            expected, rows = reference.search(query, document[rest], 27, [(2, 5)])
            assert ids.tolist() == np.array(rest)[rows].astype(str).tolist()
            np.testing.assert_allclose(scores, expected, rtol=1e-5)
        index.compact()
    assert len(index._segments[0]) == 27


def test_few_programs_are_compiled():
    rng = np.random.default_rng(4)
    index = me.Index.build(unit(rng, 100, 4, 8), mesh=ONE)
    index.search(unit(rng, 4, 2, 8), 10)
    before = engine.merge_tiles._cache_size()
    for queries, k in ((3, 9), (4, 16), (4, 11)):
        index.search(unit(rng, queries, 2, 8), k)
    assert engine.merge_tiles._cache_size() == before


def test_a_resident_index_follows_its_changes(tmp_path):
    rng = np.random.default_rng(8)
    query, document = unit(rng, 3, 2, 8), unit(rng, 300, 5, 8)
    me.Index.build(document[:150], dtype="float32", path=tmp_path)
    index = me.Index.load(tmp_path, mesh=ONE, resident=True)
    items = {str(n): document[n] for n in range(150)}

    def check():
        stages = [(1, 1, 4, 100), (2, 5)]
        scores, ids = index.search(query, 20, stages)
        expected_scores, rows = reference.search(query, list(items.values()), 20, stages)
        assert ids.tolist() == np.array(list(items))[rows].tolist()
        np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)

    check()
    vectors = next(iter(index._searcher.loaded.values())).vectors
    for start in range(150, 300, 25):  # more segments than one program takes
        new = {str(n): document[n] for n in range(start, start + 25)}
        index.add(np.stack(list(new.values())), list(new))
        index.delete([str(start - 110), str(start)])
        items = {name: item for name, item in (items | new).items() if name not in (str(start - 110), str(start))}
        check()
    assert next(iter(index._searcher.loaded.values())).vectors is vectors  # not read again
    index.compact()
    check()
    assert len(index._searcher.loaded) == 1


def test_items_that_are_added_while_a_thread_loads_are_found(monkeypatch):
    rng = np.random.default_rng(10)
    index, load, loading, is_added = me.Index.build(unit(rng, 5, 2, 8), mesh=ONE), Searcher._load, Event(), Event()

    def load_after_change(searcher, *arguments):
        loading.set()
        is_added.wait(1)  # the change may wait for this thread
        return load(searcher, *arguments)

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as threads:
        patch.setattr(Searcher, "_load", load_after_change)
        search = threads.submit(index.search, unit(rng, 1, 2, 8), 5)
        loading.wait()
        threads.submit(index.add, unit(rng, 3, 2, 8), ["a", "b", "c"]).add_done_callback(lambda _: is_added.set())
        assert search.result().ids.shape == (1, 5)
    assert index.search(unit(rng, 1, 2, 8), 8).ids.shape == (1, 8)


def test_what_does_not_fit_is_not_resident(monkeypatch):
    rng = np.random.default_rng(9)
    index = me.Index.build(unit(rng, 50, 4, 8), mesh=ONE)
    monkeypatch.setattr(module, "free_memory", lambda mesh: 1000)
    assert not me.Index.load(index.folder, resident="auto")._searcher.loaded
    with pytest.raises(me.UserError, match="take 17,024 bytes on a device, of which 1,000 are free"):
        me.Index.load(index.folder, resident=True, mesh=ONE).search(unit(rng, 1, 2, 8))
    with pytest.raises(me.UserError, match='resident=1: expected True, False or "auto"'):
        me.Index.load(index.folder, resident=1)


def test_more_vectors_stored_than_are_searched_are_not_read():
    """A search reads only the levels of its budget: damage in other levels is not noticed."""
    rng = np.random.default_rng(5)
    index = me.Index.build(unit(rng, 50, 64, 8), mesh=ONE)
    file = next(index.folder.glob("*/vectors-16-64"))
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)
    index = me.Index.load(index.folder, mesh=ONE)
    index.search(unit(rng, 2, 16, 8), 5, (16, 16))
    with pytest.raises(me.UserError, match="vectors-16-64 is damaged near byte 0"):
        index.search(unit(rng, 2, 16, 8), 5, (16, 17))
