"""Results of tasks are read again under their key, and only then."""

import json

import pytest

from metaembed_jax.errors import UserError
from metaembed_jax.evaluation import result_cache
from metaembed_jax.evaluation.result_cache import cached
from metaembed_jax.results import Failure, Interval, SearchResults, TaskResults


def results(queries):
    failure = Failure(dataset=("a", "test"), query=1, rank=2, among=3, right=((0, 0.5),), above=((2, 1.0),))
    search = SearchResults(budget="1:1>2:2", metrics={"P": Interval(0.5, 0.0, 1.0), "Q": Interval(0.25)})
    facts = {"name": "naïve", "metric": "P", "documents": 3, "dimension": 4, "data": "x", "chance": 0.5}
    return TaskResults(**facts, queries=queries, searches=(search,), failures=(failure,))


def test_cached(tmp_path, monkeypatch):
    path, calls = tmp_path / "new" / "a.json", []

    def evaluate():
        calls.append(None)
        return results(len(calls))

    assert [cached(path, key, evaluate) for key in ("a", "a", "b", "b", "a")] == [results(n) for n in (1, 1, 2, 2, 3)]
    stored = json.loads(path.read_text())
    assert stored["queries"] == 3 and stored["name"] == "naïve" and "gain" not in stored
    monkeypatch.setattr(result_cache, "LAYOUT", result_cache.LAYOUT - 1)
    assert cached(path, "a", evaluate).queries == 4


@pytest.mark.parametrize("content", [b"", b'{"key": "a", "val', b"[]", b"\xff", b"null"])
def test_a_broken_file_holds_nothing(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert cached(tmp_path / "a.json", "a", lambda: results(1)) == results(1)
    assert json.loads((tmp_path / "a.json").read_text())["queries"] == 1


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        cached(tmp_path / "file" / "a.json", "a", lambda: results(1))
