"""Calls that encode a stream, as a pure function of sizes."""

import numpy as np
import pytest

from metaembed_jax.batch.items import Size
from metaembed_jax.encoding import schedule as module
from metaembed_jax.encoding.schedule import SMALL, Schedule, row_size

ROW, META, BUDGET = (1664, 4608), 80, 64


def plan(prompts_N2, shards, chunk=None, row=ROW, meta=META, budget=BUDGET):
    """Return all calls for items that arrive in chunks, as the encoder takes them."""
    schedule, chunk, calls = Schedule(*row, meta, budget, shards), chunk or 64 * shards, []
    for first in range(0, len(prompts_N2), chunk):
        prompts_n2, is_last = prompts_N2[first : first + chunk], first + chunk >= len(prompts_N2)
        schedule.add(np.arange(first, first + len(prompts_n2)), prompts_n2)
        if schedule.is_full or is_last:
            calls += schedule.take(is_last)
    return calls


def images(count, seed=0):
    """Return (tokens, patches) of images of very different sizes."""
    patches = 64 * np.clip(np.exp(np.random.default_rng(seed).normal(2.3, 1.2, count)), 1, 72).astype(int)
    return np.stack([patches // 4 + 20, patches], axis=1)


def check(calls, prompts_N2, meta=META, budget=BUDGET):
    """Check that every item is in exactly one row, and that rows hold their items."""
    assert sorted(number for call in calls for items in call.rows for number in items) == list(range(len(prompts_N2)))
    for call in calls:
        assert 0 < len(call.rows) <= call.size
        for items in call.rows:
            tokens, patches = prompts_N2[items].sum(axis=0)
            size = np.array([tokens + meta * len(items), patches, budget * len(items)])
            assert items and (size <= np.array(call.row)).all()


@pytest.mark.parametrize("shards, bound", [(1, 1.15), (8, 1.2), (64, 1.5)])
@pytest.mark.parametrize("count", [200, 1000])
def test_three_programs_encode_images_of_any_sizes(shards, bound, count):
    prompts_N2 = images(count)
    calls = plan(prompts_N2, shards)
    check(calls, prompts_N2)
    assert len({(call.size, call.row) for call in calls}) <= 3
    if count == 1000:
        assert sum(call.size * call.row.patches for call in calls) <= bound * prompts_N2[:, 1].sum()


def test_items_wait_until_they_fill_a_window(monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 16)
    prompts_N2 = images(300)
    calls = plan(prompts_N2, 1, chunk=7)
    check(calls, prompts_N2)
    assert all(len(call.rows) == call.size == 4 for call in calls[:4])
    firsts = [min(number for row in call.rows for number in row) for call in calls]
    assert firsts == sorted(firsts)  # the oldest item is always in the next call, so none waits for ever


def test_the_first_calls_of_a_stream_are_short(monkeypatch):
    monkeypatch.setattr(module, "LONG", 32)
    prompts_N2 = images(600)
    calls = plan(prompts_N2, 2)
    check(calls, prompts_N2)
    sizes = [call.size for call in calls]
    assert sizes[:8] == [8] * 8 and sizes[8] == 32 and sizes[8:] == sorted(sizes[8:], reverse=True)


def test_a_few_short_texts_have_a_small_row():
    (call,) = plan(np.array([[20, 0]]), 4, meta=16, budget=16)
    assert (call.size, call.row.tokens, call.row.patches, call.rows) == (4, SMALL, 0, [[0]])
    (call,) = plan(np.full((12, 2), (20, 0)), 4, meta=16, budget=16)
    assert call.row.tokens == SMALL and len(call.rows) == 4
    for prompts in ([[113, 0]], [[20, 64]], [[20, 0]] * 13):  # a long text, an image, too many
        calls = plan(np.array(prompts), 4, meta=16, budget=16)
        assert {call.row.tokens for call in calls} == {ROW[0]}
        assert {call.row.patches for call in calls} == {ROW[1] if prompts[0][1] else 0}
    assert plan(np.zeros((0, 2), int), 4) == []


def test_texts_run_without_the_vision_tower_until_the_first_image():
    prompts_N2 = np.array([[200, 0]] * 3000 + [[100, 256]] + [[200, 0]] * 500)
    calls = plan(prompts_N2, 1)
    check(calls, prompts_N2)
    patches = [call.row.patches for call in calls]
    assert patches[0] == 0 and patches[-1] == ROW[1] and patches == sorted(patches)


def test_a_row_has_vectors_for_short_items():
    assert row_size(1664, 4608, 80, 64) == Size(1664, 4608, 1088)
    assert row_size(128, 0, 16, 16) == Size(128, 0, 64)
    assert row_size(20, 0, 16, 1).vectors == 16
