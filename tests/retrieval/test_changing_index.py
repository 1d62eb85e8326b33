"""Searches in several threads while another process adds, deletes, compacts and builds again: no wrong and no torn answer."""

import multiprocessing
import sys

import jax
import pytest

from metaembed_jax.mesh import make_mesh
from tests.retrieval import changing_index


def search(folder, threads, seconds, **options):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([changing_index.__name__])
    is_built = context.Event()
    process = context.Process(target=changing_index.write_forever, args=(folder, is_built))
    process.start()
    try:
        assert is_built.wait(60)
        searches = changing_index.Searches(folder, mesh=make_mesh(devices=jax.devices()[:1]), **options)
        searches.run(threads, 0.1)  # compiles
        searches.run(threads, seconds)
        assert process.is_alive()
    finally:
        process.kill()
        process.join()
    if searches.failures:
        raise searches.failures[0]
    return searches


@pytest.mark.parametrize("resident", [False, True])
def test_answers_while_another_process_writes(tmp_path, resident):
    searches = search(tmp_path / "index", threads=4, seconds=2, resident=resident)
    assert searches.count > 20 and len(searches.states) > 2


@pytest.mark.slow
@pytest.mark.parametrize("resident", [False, True])
def test_answers_for_a_minute(tmp_path, resident):
    searches = search(tmp_path / "index", threads=8, seconds=60, resident=resident)
    print(f"{searches.count:,} searches of {len(searches.states)} states", file=sys.stderr)
    assert len(searches.states) == 2 * changing_index.BATCHES
