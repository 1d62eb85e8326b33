"""Votes of hosts that are threads here, over a store that is a dictionary."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import pytest

from metaembed_jax import votes
from metaembed_jax.votes import Stop, Terminated, Vote

HOSTS = 3


class Store:
    """What the hosts share: keys are set once."""

    def __init__(self):
        self._values, self._changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self._changed:
            if key in self._values:
                raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
            self._values[key] = value
            self._changed.notify_all()

    def key_value_try_get(self, key):
        if key not in self._values:
            raise jax.errors.JaxRuntimeError("NOT_FOUND")
        return self._values[key]

    def blocking_key_value_get(self, key, milliseconds):
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, milliseconds / 1000)
            return self._values[key]


@pytest.fixture
def on_each(monkeypatch):
    """Calls a function of a host's number on all of them at once."""
    here = threading.local()
    monkeypatch.setattr(votes.jax, "process_index", lambda: here.number)
    monkeypatch.setattr(votes.distributed, "global_state", SimpleNamespace(client=Store(), num_processes=HOSTS))

    def call(function):
        def run(number):
            here.number = number
            return function(number)

        with ThreadPoolExecutor(HOSTS) as pool:
            return list(pool.map(run, range(HOSTS)))

    return call


def test_all_hosts_act_at_the_same_call_and_again_at_the_next_wish(on_each):
    wishes, ahead, seen = [threading.Event() for _ in range(HOSTS)], (4, 9, 2), [[] for _ in range(HOSTS)]
    ballot = [Vote(wish.is_set) for wish in wishes]
    for vote in ballot[1:]:
        vote._name = ballot[0]._name  # as in processes of their own

    def ask(number, until):
        while len(seen[number]) < until:
            seen[number].append(ballot[number]())

    on_each(lambda number: ballot[number]._look())  # nobody wishes
    on_each(lambda number: ask(number, ahead[number]))
    wishes[2].set()
    on_each(lambda number: take(ballot[number]))
    wishes[2].clear()
    on_each(lambda number: ask(number, 14))
    wishes[0].set()
    on_each(lambda number: take(ballot[number]))
    wishes[0].clear()
    on_each(lambda number: ask(number, 20))
    assert all([call for call, acts in enumerate(calls, 1) if acts] == [10, 15] for calls in seen)


def take(vote):
    """Looks until the vote is taken: at the first look, the wish may not be known yet."""
    while vote._agreed == votes.math.inf:
        vote._look()


def test_stop_stays_and_leaves_at_once_only_where_nothing_is_unsaved():
    stop = Stop()
    assert not stop()
    with stop.at_once():
        pass
    stop.signalled()
    assert stop() and stop()
    with pytest.raises(Terminated) as stopped, stop.at_once():
        raise AssertionError("it would go on")
    assert stopped.value.code == 143
    stop = Stop()
    with pytest.raises(Terminated), stop.at_once():
        try:
            stop.signalled()
        finally:
            stop.signalled()  # a second one lets what is put in order be
