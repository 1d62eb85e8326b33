"""The commands `calibrate`, `index --exact`, `search --certified` and `search --budget=auto`, with a model without a network."""

import json
import sys

import jax
import numpy as np
import pytest

import metaembed_jax as me
from metaembed_jax import cli
from metaembed_jax.flags import run_main
from metaembed_jax.mesh import make_mesh
from tests.retrieval.fake_model import FakeModel, content, vectors

ONE = make_mesh(devices=jax.devices()[:1])


class Encoder(FakeModel):
    weight_bytes = 0

    def encode_query(self, items, *, budget=None, progress=False):
        return np.array([vectors(content({"text": item["text"]}))[:budget] for item in items])


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs a command and returns the lines of its output, and its error."""
    monkeypatch.setattr(me.MetaEmbed, "from_pretrained", lambda name, mesh: Encoder())

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["metaembed", *map(str, arguments)])
        try:
            run_main(cli.main)
        except SystemExit as stopped:
            assert stopped.code == 2
        output = capsys.readouterr()
        return output.out.splitlines() + [line for line in output.err.splitlines() if line.startswith("error: ")]

    return run


def test_sure_answers(run, tmp_path):
    table, folder = tmp_path / "rows.jsonl", tmp_path / "index"
    table.write_text("".join(json.dumps({"id": f"row {n}", "text": f"text {n}"}) + "\n" for n in range(20)))
    command = "index", "--model=fake", f"--input={table}", f"--out={folder}", "--dtype=int8"
    assert "expected dtype='int8'" in run(*command[:-1], "--exact=float32")[-1]
    run(*command, "--exact=float32")
    search = "search", f"--index={folder}", "text 3"
    lines = run(*search, "-k", 2, "--certified")
    assert len(lines) == 3 and lines[0].split()[:4] == ["1", "4.0000", "row", "3"]
    assert lines[2].startswith("certified; ") and lines[2].endswith(" items were scored by their exact vectors")
    assert "this index is not calibrated" in run(*search, "--budget=auto")[-1]

    calibrate = "calibrate", f"--index={folder}", f"--queries={table}"
    lines = run(*calibrate, "-k", 3, "--first=1:1,2:2", "--last=4:4", "--coverage=0.8", "--confidence=0.9")
    first, second = me.Index.load(folder, mesh=ONE).calibrations
    assert [str(budget) for budget in (first.first, second.first, first.last)] == ["1:1", "2:2", "4:4"]
    assert (first.k, first.queries) == (3, 20)
    assert lines[0].startswith(f"1:1:{first.survivors}>4:4: ") and lines[1].startswith(f"2:2:{second.survivors}>4:4: ")
    assert lines[0].endswith(
        "of 20 items survive the first stage; at least 80.00% of queries lose none of their 3 best (confidence 90.00%, 20 queries)"
    )
    assert lines[2].startswith("--budget=auto is ") and lines[2].endswith(">4:4 for up to 3 documents") and len(lines) == 3
    assert [line[:3] for line in run(*search, "-k", 3, "--budget=auto")] == ["  1", "  2", "  3"]
    shares = "--coverage=0.8", "--confidence=0.8"
    for arguments, message in [
        ((), "20 queries: expected at least 299 for coverage=0.99 with confidence=0.95"),
        (("--first=1:1:5>2:2", *shares), "--first=1:1:5>2:2: expected budgets r_q:r_c"),
        (("--last=1:1,2:2", *shares), "--last=1:1,2:2: expected one budget"),
        (("--last=2:9", *shares), "goes beyond the vectors given"),
        (("-k", 21, *shares), "k=21: expected 1 to 20"),
        (("--coverage=2",), "coverage=2.0: expected a share between 0 and 1"),
    ]:
        assert message in run(*calibrate, *arguments)[-1]
    assert len(me.Index.load(folder, mesh=ONE).calibrations) == 2
    lines = run(*calibrate, *shares)
    assert [line[:4] for line in lines[:-1]] == ["1:1:", "2:4:"] and ">4:4" in lines[0]  # the usual budgets below 4:4


def test_errors_before_the_model_is_loaded(run, tmp_path, monkeypatch):
    folder, table = tmp_path / "index", tmp_path / "rows.jsonl"
    me.Index.build(np.eye(8, dtype=np.float32)[None], path=folder, dtype="int8")
    table.write_text('{"text": "a"}\n')
    monkeypatch.setattr(me.MetaEmbed, "from_pretrained", None)  # not to be called
    search, calibrate = (f"--index={folder}", "text", "--model=fake"), (f"--index={folder}", "--model=fake")
    assert "k=2: expected 1 to 1, the number of items" in run("search", *search, "-k", 2)[-1]
    assert "no item has the key 'lang'" in run("search", *search, '--where={"lang": "en"}')[-1]
    assert "expected at most 999999 of a query and 8 of a document" in run("search", *search, "--budget=4:9")[-1]
    assert "has no exact vectors" in run("search", *search, "--certified")[-1]
    assert "1 queries: expected at least 299" in run("calibrate", *calibrate, f"--queries={table}")[-1]
