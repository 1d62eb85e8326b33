"""Results are found again under their key, and only then."""

import json

import pytest

from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.records import found_once, write_json


def test_found_once(tmp_path):
    path, asked = tmp_path / "new" / "a.json", []

    def find():
        asked.append(len(asked))
        return {"value": len(asked), "name": "naïve"}

    assert [found_once(path, key, find)["value"] for key in ("a", "a", "b", "b", "a")] == [1, 1, 2, 2, 3]
    assert json.loads(path.read_text()) == {"key": "a", "value": 3, "name": "naïve"}


@pytest.mark.parametrize("content", [b"", b'{"key": "a", "val', b"[]", b"\xff", b"null"])
def test_a_broken_file_holds_nothing(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert found_once(tmp_path / "a.json", "a", lambda: {"value": 1}) == {"key": "a", "value": 1}
    assert json.loads((tmp_path / "a.json").read_text())["value"] == 1


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        write_json(tmp_path / "file" / "a.json", {})
