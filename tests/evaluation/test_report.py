"""The sweep over budgets, and its report: tables, JSON, plot."""

import errno
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metaembed_jax import cli
from metaembed_jax.errors import UserError
from metaembed_jax.evaluation import metrics
from metaembed_jax.evaluation.evaluator import Subject
from metaembed_jax.evaluation.plots import Point, connected, draw_results
from metaembed_jax.evaluation.report import TEST_SPLIT, benchmark_names, write_report
from metaembed_jax.evaluation.sweep import sweep
from metaembed_jax.evaluation.tables import format_tables
from metaembed_jax.results import Board, Interval, Results, from_json, read_results, to_json


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def encoded():
    """Noisy views of 40 things, two documents each and one that nobody looks for: more vectors, less noise."""
    random = np.random.default_rng(0)
    things = random.normal(size=(40, 1, 8))
    query = unit(things + 1.5 * random.normal(size=(40, 4, 8)))
    document = unit(
        np.concatenate([np.repeat(things, 2, axis=0), random.normal(size=(1, 1, 8))]) + 1.5 * random.normal(size=(81, 6, 8))
    )
    return query, document, [{2 * n, 2 * n + 1} for n in range(40)]


@pytest.fixture(scope="module")
def swept(encoded):
    return sweep("icons", *encoded, budgets=((4, 6), (1, 1), (2, 3)))


@pytest.fixture(scope="module")
def results(swept):
    boards = (("text→image", (swept.forward,)), ("image→text", (swept.backward,)))
    return results_of(*(board(name, tasks) for name, tasks in boards))


def board(name, tasks, **changes):
    return Board(name=name, measure="R@10", secondary="R@1", legend="how to read it", tasks=tasks, total=len(tasks), **changes)


def results_of(*boards):
    return Results(title="icons, test split", model="tiny", step=8, data="sha256:12", boards=boards)


def test_sweep_equals_the_definition(encoded, swept):
    query, document, relevance = encoded
    forward, backward = swept
    assert [search.budget for search in forward.searches] == ["1:1", "2:3", "4:6"]  # cheapest first
    assert (forward.name, forward.queries, forward.documents, forward.dimension) == ("icons", 40, 81, 8)
    assert (backward.queries, backward.documents) == (80, 40)  # the document that is not named asks nothing
    assert [search.flops_per_document for search in backward.searches] == [16, 96, 384]
    assert [search.bytes_per_document for search in forward.searches] == [16, 48, 96]
    assert [search.bytes_per_document for search in backward.searches] == [16, 32, 64]  # the texts are what is searched
    per_query = {}
    for n, (r_q, r_c) in enumerate([(1, 1), (2, 3), (4, 6)]):
        scores = np.einsum("qid,njd->qnij", query[:, :r_q], document[:, :r_c]).max(-1).sum(-1)
        per_query[n] = metrics.evaluate(scores, relevance)
        back = metrics.evaluate(scores.T[:80], [{n // 2} for n in range(80)])
        for name in metrics.METRICS:
            assert forward.searches[n].metrics[name].mean == pytest.approx(per_query[n][name].mean(), abs=1e-9)
            assert backward.searches[n].metrics[name].mean == pytest.approx(back[name].mean(), abs=1e-9)
    assert (forward.gain.smallest, forward.gain.largest) == ("1:1", "4:6")
    for name, gain in forward.gain.metrics.items():
        ends = metrics.bootstrap_mean(per_query[2][name] - per_query[0][name], seed=0)
        assert (gain.mean, gain.low, gain.high) == pytest.approx(tuple(map(float, ends)), abs=1e-9)


def test_widths_cut_both_sides(encoded):
    query, document, relevance = encoded
    forward, backward = sweep("icons", *encoded, budgets=((4, 6), (4, 6, 2), (1, 1), (4, 6, 8)))
    assert [search.budget for search in forward.searches] == ["1:1", "4:6x2", "4:6", "4:6x8"]
    assert [search.flops_per_document for search in forward.searches] == [16, 96, 384, 384]
    assert [search.bytes_per_document for search in forward.searches] == [16, 24, 96, 96]
    assert [search.bytes_per_document for search in backward.searches] == [16, 16, 64, 64]
    cut = (x[..., :2].astype(float) / np.linalg.norm(x[..., :2].astype(float), axis=-1, keepdims=True) for x in (query, document))
    scores = np.einsum("qid,njd->qnij", *cut).max(-1).sum(-1)
    for name, values in metrics.evaluate(scores, relevance).items():
        assert forward.searches[1].metrics[name].mean == pytest.approx(values.mean(), abs=1e-9)
    assert forward.searches[2].metrics == forward.searches[3].metrics != forward.searches[1].metrics


def test_one_query_one_document_one_budget():
    vectors = unit(np.ones((1, 1, 4)))
    swept = sweep("one", vectors, vectors, np.array([[True]]), [(1, 1)])
    assert all(task.gain is None for task in swept)
    assert "gain" not in format_tables(results_of(board("forward", swept[:1])))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(budgets=[(1, 7)]), r"budget \(1, 7\) goes beyond the vectors given; expected at most 4 of a query and 6"),
        (dict(document=np.zeros((81, 6, 9))), r"\(40, 4, 8\) and document vectors \(81, 6, 9\)"),
        (dict(document=np.full((81, 6, 8), np.nan, np.float32)), "NaN"),
        (dict(relevance=[set()] * 40), "no relevant document"),
    ],
)
def test_sweep_refuses(encoded, change, message):
    query, document, relevance = encoded
    arguments = dict(document=document, relevance=relevance, budgets=[(1, 1)]) | change
    with pytest.raises(UserError, match=message):
        sweep("icons", query, arguments["document"], arguments["relevance"], arguments["budgets"])


def test_table_of_metrics(results):
    forward, backward = format_tables(results).split("\n\n")
    title, head, *rows = forward.splitlines()
    assert title.startswith("text→image: 40 queries, 81 documents") and backward.startswith("image→text: 80 queries")
    assert head.split() == ["budget", "FLOPs", "bytes", *metrics.METRICS]
    assert [row.split()[0] for row in rows] == ["1:1", "2:3", "4:6", "gain", "95"]
    assert len({len(line) for line in [head, *rows]}) == 1  # aligned
    r1 = results.boards[0].tasks[0].gain.metrics["R@1"]
    assert f"{100 * r1.mean:+.1f}" in rows[3] and f"{100 * r1.low:+.1f} to {100 * r1.high:+.1f}" in rows[4]


def test_table_of_tasks_has_their_means(swept):
    icons, boards = swept.forward, replace(swept.backward, name="boards", chance=1e-9)
    guessed = replace(icons, name="guessed", chance=0.999)
    of_many = board("query→document", (icons, boards, guessed), groups={"some": ("icons", "boards")}, notes=("left out: x",))
    title, head, *rows = format_tables(results_of(of_many)).splitlines()
    assert title == "query→document, R@10 (%) of 160 queries in 3 tasks" and head.split() == ["task", "1:1", "2:3", "4:6"]
    values = [[task.searches[n].metrics["R@10"].mean for n in range(3)] for task in (icons, boards)]
    means = np.mean([values[0], values[1], values[0]], axis=0)
    expected = [("icons", values[0]), ("boards", values[1]), ("guessed, no better than chance", values[0])]
    expected += [("mean: some", np.mean(values, axis=0)), ("mean of 3 of 3 tasks", means)]
    shown = [(row.rsplit(maxsplit=3)[0], row.split()[-3:]) for row in rows if row and row != "left out: x"]
    assert shown == [(name, [f"{100 * value:.1f}" for value in row]) for name, row in expected] and rows[-1] == "left out: x"
    assert of_many.mean("R@1")["1:1"].low is None and results_of(of_many).boards[0].mean()["4:6"].mean == pytest.approx(means[2])


class Nothing:
    """An evaluator whose failures are not looked up."""

    name = "nothing"

    def show(self, failures):
        assert [failure.rank for failure in failures] == sorted((failure.rank for failure in failures), reverse=True)
        return []


def write(out, results, names=TEST_SPLIT, **config):
    return write_report(Nothing(), Subject(model=None, name="tiny", step=8, config=config), results, out, names)


def test_results_survive_json_and_are_stable(tmp_path, results):
    written = write(tmp_path / "new", results, steps=3)
    assert [path.name for path in written] == ["results.json", "results.txt", "quality.png", "report.html"]
    assert sorted(tmp_path.joinpath("new").iterdir()) == sorted(written)
    content = json.loads(written[0].read_text(encoding="utf-8"))
    assert content["config"] == {"steps": 3} and content["versions"].keys() >= {"jax"} and content["data"] == "sha256:12"
    means = content["boards"][0]["means"]["all"]
    assert means["4:6"] == content["boards"][0]["tasks"][0]["searches"][2]["metrics"]["R@10"]
    assert read_results(written[0]) == results == from_json(Results, to_json(results))
    assert written[1].read_text(encoding="utf-8") == format_tables(results) + "\n"
    first = [path.read_bytes() for path in written]
    write(tmp_path / "new", results, steps=3)
    assert [path.read_bytes() for path in written] == first


def test_failed_writes_keep_the_old_file(tmp_path, results, monkeypatch):
    path = write(tmp_path, results)[0]
    first, files = path.read_bytes(), sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="NaN"):
        write(tmp_path, results, rate=float("nan"))

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="cannot write .*results.json: No space left on device"):
        write(tmp_path, results)
    assert path.read_bytes() == first and sorted(tmp_path.iterdir()) == files


def test_a_path_that_cannot_be_written(tmp_path, results):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write(Path(tmp_path, "file"), results)


def test_plot(results, swept):
    several = results_of(board("query→document", (swept.forward, swept.forward), groups={"half": ("icons",)}, drawn=("half",)))
    results = replace(results, model="lr$1_$2")  # not a formula
    content = draw_results([results, several])
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG" and min(image.size) > 600
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50  # something is drawn
    assert draw_results([results, several]) == content
    assert draw_results([several, results]) != content


def test_widths_are_drawn_as_a_pareto_front(encoded, results):
    def point(name, size, mean):
        return Point(name, size, size, mean, mean, mean)

    narrow, first, many, wide, worse = (
        point("4:6x2", 24, 0.5),
        point("1:1", 16, 0.2),
        point("4:6", 96, 0.8),
        point("2:3", 48, 0.4),
        point("2:2x6", 24, 0.3),
    )
    assert connected([many, worse, narrow, wide, first], "bytes") == [first, narrow, many]
    assert connected([many, wide, first], "bytes") == [first, wide, many]  # without a width, a line connects all
    swept = sweep("icons", *encoded, budgets=((4, 6), (4, 6, 2), (1, 1), (1, 6)))
    content = draw_results([results_of(board("text→image", (swept.forward,)))])
    assert content is not None and content != draw_results([results])


def test_stages_alone_have_no_plot(tmp_path, results):
    task = results.boards[0].tasks[0]
    searches = tuple(replace(search, flops_per_document=None, bytes_per_document=None) for search in task.searches[:1])
    staged = results_of(replace(results.boards[0], tasks=(replace(task, searches=searches, gain=None),), total=2))
    assert draw_results([staged]) is None
    assert [path.name for path in write(tmp_path, staged, benchmark_names("x"))] == ["x.json", "x.txt", "x.html"]


def test_the_plot_command_draws_several_runs(tmp_path, results, capsys):
    for name in ("icons", "boards"):
        write(tmp_path / name, replace(results, model=name))
    paths = [str(tmp_path / name / "results.json") for name in ("icons", "boards")]
    cli.main(["plot", *paths, f"--out={tmp_path / 'both.png'}"])
    assert "both.png" in capsys.readouterr().out
    with Image.open(tmp_path / "both.png") as plot:
        assert plot.size[0] > 1000
    for content, message in {
        "[]": "holds a list, not an object",
        "{}": "is not a results.json",
        '{"title": "x", "model": "x", "step": "8", "data": "", "boards": []}': "is not a results.json",
    }.items():
        Path(paths[0]).write_text(content)
        with pytest.raises(UserError, match=f"results.json:? {message}"):
            cli.main(["plot", *paths])


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda board: board["tasks"][0]["searches"][0]["metrics"]["R@10"].update(mean=float("nan")), "R@10 is .nan"),
        (lambda board: board["tasks"][0]["searches"][2]["metrics"]["R@1"].update(mean=31.5), r"R@1 is \[31.5, .*from 0 to 1"),
        (lambda board: board["tasks"][0]["searches"][0]["metrics"]["R@5"].update(low=-0.5), "R@5 is"),
        (lambda board: board["tasks"][0]["searches"][1]["metrics"].pop("R@1"), "budget 2:3: metrics lacks 'R@1'"),
        (lambda board: board["tasks"][0]["searches"][1].update(flops_per_document=0), "budget 2:3: a cost is 0"),
        (lambda board: board["tasks"][0].update(metric="R@3"), "budget 1:1: metrics lacks 'R@3'"),
        (lambda board: board["tasks"][0].update(searches=[]), "its searches are not those of the board's first task"),
        (lambda board: board["tasks"].append(board["tasks"][0] | {"searches": board["tasks"][0]["searches"][:2]}), "its searches"),
        (lambda board: board.update(drawn=["half"]), "drawn has 'half'; expected a group with tasks"),
        (lambda board: board.update(drawn=["half"], groups={"half": ["none"]}), "drawn has 'half'; expected a group with tasks"),
    ],
)
def test_edited_results_are_refused(tmp_path, results, edit, message):
    path = write(tmp_path, results)[0]
    content = json.loads(path.read_text())
    edit(content["boards"][0])
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"results.json: board 'text→image'.*{message}.*write it again"):
        cli.main(["plot", str(path), f"--out={tmp_path / 'x.png'}"])
    path.write_text(json.dumps(content | {"boards": []}))
    with pytest.raises(UserError, match="results.json: boards is empty"):
        read_results(path)


def test_an_interval_without_ends_is_written_without_them():
    assert to_json(Interval(0.5)) == {"mean": 0.5} and from_json(Interval, {"mean": 1}) == Interval(1)
    for content in ({}, {"mean": "x"}, [0.5], {"mean": 0.5, "low": "x"}):
        with pytest.raises(TypeError):
            from_json(Interval, content)
