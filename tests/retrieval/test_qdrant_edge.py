"""Qdrant's engine in this process: what a folder of it survives, and what it refuses. Searches are in test_qdrant.py."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from qdrant_client import models

from metaembed_jax.errors import UserError
from metaembed_jax.retrieval import qdrant_edge
from metaembed_jax.retrieval.qdrant import QdrantIndex
from tests.retrieval.test_qdrant import DOCUMENTS, QUERIES, WIDTH, expected, names

PROGRAM = "tests.retrieval.edge_program"


def create(folder, **options):
    return QdrantIndex.create(f"edge:{folder}", "icons", WIDTH, 64, "model a", **options)


def test_a_killed_process_loses_nothing_that_was_written(tmp_path):
    """SIGKILL comes while `add` writes the requests after the third."""
    command = [sys.executable, "-m", PROGRAM, f"edge:{tmp_path}", str(WIDTH)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        for _ in range(3):
            process.stdout.readline()
        process.kill()
        written = int(["192", *process.stdout.read().split()][-1])
    ids = names(2000)
    with closing(create(tmp_path)) as index:
        missing = index.missing(ids)
        assert 192 <= written <= len(index) < 2000 and min(missing) >= written
        index.add([ids[n] for n in missing], DOCUMENTS[missing])
    with closing(QdrantIndex.load(f"edge:{tmp_path}", "icons")) as index:
        assert len(index) == 2000 and not index.missing(ids)
        np.testing.assert_array_equal(index.search(QUERIES, 10)[1], expected(DOCUMENTS, (16, 64), 10)[1])


def test_a_second_opener_is_refused(tmp_path):
    with closing(create(tmp_path)) as index, pytest.raises(UserError, match="collection 'icons' is open already"):
        QdrantIndex.load(index.server.removeprefix("Qdrant at "), "icons")
    for _ in range(2):  # a refusal unlocks the folder
        with pytest.raises(UserError, match="not 'model b'"):
            QdrantIndex.load(f"edge:{tmp_path}", "icons", "model b")
    with closing(create(tmp_path)) as index, closing(QdrantIndex.create(f"edge:{tmp_path}", "boards", 8, 2)):
        assert len(index) == 0


def test_a_graph_is_built_and_an_exact_first_stage_scans(tmp_path):
    stages = [(1, 1, 100), (16, 64)]
    with closing(create(tmp_path)) as index:
        index.add(names(2000), DOCUMENTS)
        assert index.client.info().indexed_vectors_count == 0
        index.optimize()
        assert index.client.info().indexed_vectors_count > 0
        np.testing.assert_array_equal(index.search(QUERIES, 10, stages, exact=True)[1], expected(DOCUMENTS, stages, 10)[1])
    params = models.SearchParams(exact=True)
    request = models.QueryRequest(
        prefetch=models.Prefetch(query=[0.0] * WIDTH, using="first", limit=9, params=params), query=[1.0], using="all", limit=1
    )
    assert qdrant_edge._stage(request)["prefetches"][0].params.exact


def test_deleted_items_do_not_come_back(tmp_path):
    ids = names(100)
    with closing(create(tmp_path)) as index:
        index.add(ids, DOCUMENTS[:100])
        with pytest.raises(UserError, match="no item 'x'"):
            index.delete([ids[0], "x"])
        index.delete(ids[50:])
        index.optimize()
    with closing(create(tmp_path)) as index:
        assert len(index) == 50 and index.missing(ids) == list(range(50, 100))
        np.testing.assert_array_equal(index.search(QUERIES, 10)[1], expected(DOCUMENTS[:50], (16, 64), 10)[1])


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".icons.lock", "é\x00", "x" * 101, 3])
def test_names_that_are_not_folders(tmp_path, name):
    with pytest.raises(UserError, match="expected edge:FOLDER, and a name of letters"):
        QdrantIndex.create(f"edge:{tmp_path}", name, WIDTH, 64)
    assert not list(tmp_path.iterdir())


def test_what_the_engine_lacks(tmp_path):
    with pytest.raises(UserError, match="shard_number=2 is an option of a cluster"):
        create(tmp_path, shard_number=2)
    with pytest.raises(UserError, match="has no collection 'icons'"):
        QdrantIndex.load(f"edge:{tmp_path}", "icons")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        create(tmp_path / "file")


@pytest.mark.parametrize(
    "facts",
    ["", "[]", "{}", {"dimension": 8, "document_vectors": 64, "fingerprint": "a"}, {"dimension": "32"}, {"dimension": 0}],
    ids=str,
)
def test_damaged_facts_are_one_error(tmp_path, facts):
    create(tmp_path).close()
    file = tmp_path / "icons" / "metaembed.json"
    file.write_text(facts if isinstance(facts, str) else json.dumps(json.loads(file.read_text()) | facts))
    for _ in range(2):
        with pytest.raises(UserError) as error:
            QdrantIndex.load(f"edge:{tmp_path}", "icons")
        assert "open already" not in str(error.value) and "\n" not in str(error.value)


def test_damaged_files_of_the_engine_are_one_error(tmp_path):
    with closing(create(tmp_path)) as index:
        index.add(names(10), DOCUMENTS[:10])
    for file in (tmp_path / "icons" / "shard" / "segments").rglob("*.json"):
        file.write_text("{")
    with pytest.raises(UserError, match="Qdrant at edge:"):
        create(tmp_path)


def test_integers_that_the_engine_would_round(tmp_path):
    with closing(create(tmp_path)) as index:
        index.add(["a"], DOCUMENTS[:1], [{"least": -(2**63), "most": 2**64 - 1}])
        assert index.metadata(["a"]) == [{"least": -(2**63), "most": 2**64 - 1, "id": "a"}]
        with pytest.raises(UserError, match="beyond 64 bits"):
            index.add(["b"], DOCUMENTS[:1], [{"pages": [2**64]}])
        assert len(index) == 1


def test_threads_share_a_collection(tmp_path):
    with closing(create(tmp_path)) as index, ThreadPoolExecutor(4) as threads:
        index.add(names(100), DOCUMENTS[:100])
        expected_ids = expected(DOCUMENTS[:100], (16, 64), 10)[1]
        for result in threads.map(lambda _: index.search(QUERIES, 10), range(20)):
            np.testing.assert_array_equal(result.ids, expected_ids)


@pytest.mark.parametrize("module", ["qdrant_edge", "qdrant_client"])
def test_without_the_engine_the_extra_is_named(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install 'metaembed-jax\[qdrant-edge\]'"):
        create(tmp_path)


def test_a_closed_collection_is_one_error(tmp_path):
    index = create(tmp_path)
    for _ in range(2):
        index.close()
    with pytest.raises(UserError, match="Qdrant at edge:"):
        index.search(QUERIES)


def test_the_log_is_shortened(tmp_path, monkeypatch):
    """A flush shortens the engine's log, which otherwise grows with all that is written."""

    class Counted:
        flushes = 0

        def __init__(self, shard):
            self.shard = shard

        def flush(self):
            self.flushes += 1
            self.shard.flush()

        def __getattr__(self, name):
            return getattr(self.shard, name)

    monkeypatch.setattr(qdrant_edge, "LOG_BYTES", DOCUMENTS[:128].nbytes - 1)
    with closing(create(tmp_path)) as index:
        index.collection.client = counted = Counted(index.client)
        index.add(names(300), DOCUMENTS[:300])
        assert counted.flushes == 2
