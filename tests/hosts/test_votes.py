"""Votes of hosts: threads stand in for the hosts, a dictionary for their store."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import pytest

from metaembed_jax import hosts
from metaembed_jax.hosts import votes
from metaembed_jax.hosts.votes import Stop, Terminated, Vote

HOSTS = 3


class Store:
    """The store that hosts share: a key is set once."""

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
    """A call of a function on all hosts at the same time, with the number of each."""
    here = threading.local()
    monkeypatch.setattr(jax, "process_index", lambda: here.number)
    monkeypatch.setattr(hosts.distributed, "global_state", SimpleNamespace(client=Store(), num_processes=HOSTS))

    def call(function):
        def run(number):
            here.number = number
            return function(number)

        with ThreadPoolExecutor(HOSTS) as pool:
            return list(pool.map(run, range(HOSTS)))

    return call


def test_all_hosts_get_each_request_at_the_same_call(on_each):
    requests, first_calls, answers = [threading.Event() for _ in range(HOSTS)], (4, 9, 2), [[] for _ in range(HOSTS)]
    votes_of_hosts = [Vote(request.is_set) for request in requests]
    for vote in votes_of_hosts[1:]:
        vote._name = votes_of_hosts[0]._name  # as in processes of their own

    def call(host, times):
        while len(answers[host]) < times:
            answers[host].append(votes_of_hosts[host]())

    on_each(lambda host: votes_of_hosts[host]._poll())  # there is no request yet
    on_each(lambda host: call(host, first_calls[host]))
    requests[2].set()
    on_each(lambda host: agree(votes_of_hosts[host]))
    requests[2].clear()
    on_each(lambda host: call(host, 14))
    requests[0].set()
    on_each(lambda host: agree(votes_of_hosts[host]))
    requests[0].clear()
    on_each(lambda host: call(host, 20))
    assert [[number for number, answer in enumerate(calls, 1) if answer] for calls in answers] == [[10, 15]] * HOSTS


def agree(vote):
    """Poll until the hosts agree: at the first poll, the request may not be in the store yet."""
    while vote._agreed == votes.math.inf:
        vote._poll()


def test_stop_stays_true_and_raises_only_where_nothing_is_unsaved():
    stop = Stop()
    assert not stop()
    with stop.at_once():
        pass
    stop.on_signal()
    assert stop() and stop()
    with pytest.raises(Terminated) as stopped, stop.at_once():
        raise AssertionError("the block began")
    assert stopped.value.code == 143
    stop = Stop()
    with pytest.raises(Terminated), stop.at_once():
        try:
            stop.on_signal()
        finally:
            stop.on_signal()  # a second signal does not interrupt the cleaning up
