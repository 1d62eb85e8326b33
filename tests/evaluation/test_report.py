"""The sweep over budgets and what is made of it: table, JSON, picture."""

import errno
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metaembed_jax import cli
from metaembed_jax.errors import UserError
from metaembed_jax.evaluation import metrics, report
from metaembed_jax.evaluation.sweep import sweep

DIRECTIONS = ("text→image", "image→text")


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def encoded():
    """Noisy views of 40 things, two candidates each and one that nobody looks for: more vectors, less noise."""
    random = np.random.default_rng(0)
    things = random.normal(size=(40, 1, 8))
    query = unit(things + 1.5 * random.normal(size=(40, 4, 8)))
    candidate = unit(
        np.concatenate([np.repeat(things, 2, axis=0), random.normal(size=(1, 1, 8))]) + 1.5 * random.normal(size=(81, 6, 8))
    )
    return query, candidate, [{2 * n, 2 * n + 1} for n in range(40)]


@pytest.fixture(scope="module")
def results(encoded):
    return sweep(*encoded, budgets=((4, 6), (1, 1), (2, 3)), directions=DIRECTIONS)


def test_sweep_equals_the_definition(encoded, results):
    query, candidate, relevance = encoded
    forward, backward = results["directions"]
    assert [row["budget"] for row in forward["rows"]] == [[1, 1], [2, 3], [4, 6]]  # cheapest first
    assert (forward["name"], forward["queries"], forward["candidates"]) == ("text→image", 40, 81)
    assert (backward["name"], backward["queries"], backward["candidates"]) == (
        "image→text",
        80,
        40,
    )  # the unnamed candidate asks nothing
    assert [row["flops_per_candidate"] for row in backward["rows"]] == [16, 96, 384]
    assert [row["bytes_per_candidate"] for row in forward["rows"]] == [16, 48, 96]
    assert [row["bytes_per_candidate"] for row in backward["rows"]] == [16, 32, 64]  # the texts are what is searched
    per_query = {}
    for n, (r_q, r_c) in enumerate([(1, 1), (2, 3), (4, 6)]):
        scores = np.einsum("qid,njd->qnij", query[:, :r_q], candidate[:, :r_c]).max(-1).sum(-1)
        per_query[n] = metrics.evaluate(scores, relevance)
        back = metrics.evaluate(scores.T[:80], [{n // 2} for n in range(80)])
        for name in metrics.METRICS:
            assert forward["rows"][n]["metrics"][name]["mean"] == pytest.approx(per_query[n][name].mean(), abs=1e-9)
            assert backward["rows"][n]["metrics"][name]["mean"] == pytest.approx(back[name].mean(), abs=1e-9)
    assert (forward["gain"]["from"], forward["gain"]["to"]) == ([1, 1], [4, 6])
    for name, gain in forward["gain"]["metrics"].items():
        assert tuple(gain.values()) == pytest.approx(
            metrics.paired_bootstrap(per_query[2][name], per_query[0][name], seed=0), abs=1e-9
        )


def test_one_query_one_candidate_one_budget():
    one = unit(np.ones((1, 1, 4)))
    results = sweep(one, one, np.array([[True]]), [(1, 1)])
    assert all(direction["gain"] is None for direction in results["directions"])
    assert "gain" not in report.format_table(results)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(budgets=[(1, 7)]), "budget 1:7 is beyond the model's 4 query and 6 candidate vectors"),
        (dict(budgets=[]), "no budget"),
        (dict(candidate=np.zeros((81, 6, 9))), r"\(40, 4, 8\) and candidate vectors \(81, 6, 9\)"),
        (dict(candidate=np.full((81, 6, 8), np.nan, np.float32)), "NaN"),
        (dict(relevance=[set()] * 40), "no relevant candidate"),
    ],
)
def test_sweep_refuses(encoded, change, message):
    query, candidate, relevance = encoded
    arguments = dict(candidate=candidate, relevance=relevance, budgets=[(1, 1)]) | change
    with pytest.raises(UserError, match=message):
        sweep(query, arguments["candidate"], arguments["relevance"], arguments["budgets"])


def test_table(results):
    forward, backward = report.format_table(results).split("\n\n")
    head, titles, *rows = forward.splitlines()
    assert head.startswith("text→image: 40 queries, 81 candidates") and backward.startswith("image→text: 80 queries")
    assert titles.split() == ["budget", "FLOPs", "bytes", *metrics.METRICS]
    assert [row.split()[0] for row in rows] == ["1:1", "2:3", "4:6", "gain", "95"]
    assert len({len(line) for line in [titles, *rows]}) == 1  # aligned
    r1 = results["directions"][0]["gain"]["metrics"]["R@1"]
    assert f"{100 * r1['mean']:+.1f}" in rows[3] and f"{100 * r1['low']:+.1f} to {100 * r1['high']:+.1f}" in rows[4]


def write(path, results, **changed):
    report.write_results(
        path, results, **(dict(config={"steps": 3}, data_fingerprint="sha256:12", versions={"jax": "0.10"}) | changed)
    )


def test_results_survive_json_and_are_stable(tmp_path, results):
    path = tmp_path / "new" / "results.json"
    write(path, results)
    loaded = json.loads(path.read_text(encoding="utf-8"))
    assert (loaded["config"], loaded["data_fingerprint"], loaded["versions"]) == ({"steps": 3}, "sha256:12", {"jax": "0.10"})
    assert report.format_table(loaded) == report.format_table(results)
    first = path.read_bytes()
    write(path, dict(reversed(results.items())))
    assert path.read_bytes() == first and list(path.parent.iterdir()) == [path]


def test_failed_writes_keep_the_old_file(tmp_path, results, monkeypatch):
    path = tmp_path / "results.json"
    write(path, results)
    first = path.read_bytes()
    with pytest.raises(UserError, match="NaN"):
        write(path, results, config={"rate": float("nan")})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report.os, "fsync", full)
    with pytest.raises(UserError, match="cannot write .*results.json: No space left on device"):
        write(path, results, config={})
    assert path.read_bytes() == first and list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written(tmp_path, results):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write(Path(tmp_path, "file", "results.json"), results)


def test_picture(results):
    content = report.picture([("icons", results), ("boards", results)])
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG" and min(image.size) > 600
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50  # something is drawn
    assert report.picture([("icons", results), ("boards", results)]) == content


def test_the_plot_command_draws_several_runs(tmp_path, results, capsys):
    for name in ("icons", "boards"):
        write(tmp_path / f"{name}.json", results, config={"name": name})
    cli.main(["plot", str(tmp_path / "icons.json"), str(tmp_path / "boards.json"), f"--out={tmp_path / 'both.png'}"])
    assert "both.png" in capsys.readouterr().out
    with Image.open(tmp_path / "both.png") as picture:
        assert picture.size[0] > 1000
    (tmp_path / "icons.json").write_text("[]")
    with pytest.raises(UserError, match="icons.json: holds a list, not an object"):
        cli.main(["plot", str(tmp_path / "icons.json")])
