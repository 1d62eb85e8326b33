"""Tasks of mteb evaluated, killed and run again; names that mean nothing, and data that is not to be had."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

mteb = pytest.importorskip("mteb")

from datasets.exceptions import DatasetNotFoundError  # noqa: E402

from metaembed_jax.config import load_config  # noqa: E402
from metaembed_jax.errors import UserError  # noqa: E402
from metaembed_jax.evaluation.evaluate_checkpoint import evaluate_checkpoint  # noqa: E402
from metaembed_jax.evaluation.evaluator import Subject  # noqa: E402
from metaembed_jax.evaluation.mteb import evaluator, tasks  # noqa: E402
from metaembed_jax.evaluation.mteb.evaluator import Mteb  # noqa: E402
from metaembed_jax.evaluation.mteb.searcher import Searcher  # noqa: E402
from metaembed_jax.evaluation.mteb.tasks import Benchmark  # noqa: E402
from metaembed_jax.evaluation.report import benchmark_names, write_report  # noqa: E402
from metaembed_jax.evaluation.tables import format_tables  # noqa: E402
from metaembed_jax.results import TaskResults, from_json  # noqa: E402
from tests.evaluation.mteb.pages import MorePages, OtherPages, Pages  # noqa: E402
from tests.evaluation.parsed_page import Page  # noqa: E402

SEARCHES = {"1:1": (1, 1), "16:64": (16, 64), "1:1:4>16:64": ((1, 1, 4), (16, 64))}
NAMES, BUDGETS = list(SEARCHES), list(SEARCHES.values())


class ClosedPages(Pages):
    metadata = OtherPages.metadata.model_copy(update={"name": "ClosedPages", "is_public": False})

    def load_data(self, **_):
        raise DatasetNotFoundError("no such\ndata set")


def benchmarks():
    return [Benchmark("first", [Pages(), OtherPages()], ["SomethingElse"]), Benchmark("second", [MorePages()], [])]


def evaluate(model, out, step=8, budgets=BUDGETS, of=None):
    """The tables of a report that is written to `out`."""
    mteb, subject = Mteb("test", budgets), Subject(model=model, name="small", step=step, config={"seed": 0})
    mteb.benchmarks = of or benchmarks()
    results = mteb.run(subject, out, progress=False)
    write_report(mteb, subject, results, out, benchmark_names("mteb"))
    return format_tables(results)


def stored(out, *names):
    """The results of tasks in the cache, by name."""
    return {name: from_json(TaskResults, json.loads((out / "mteb" / f"{name}.json").read_text())) for name in names}


def test_tasks_survive_a_kill(model, tmp_path, monkeypatch):
    evaluated = []

    def killed_at_the_second(searcher, task, searches, *, evaluate_task=evaluator.evaluate_task):
        evaluated.append(task.metadata.name)
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        return evaluate_task(searcher, task, searches)

    monkeypatch.setattr(evaluator, "evaluate_task", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tmp_path)
    table = evaluate(model, tmp_path)
    assert evaluated == ["NoisePages", "OtherPages", "OtherPages", "MorePages"]
    assert evaluate(model, tmp_path) == table and len(evaluated) == 4
    evaluate(model, tmp_path, step=9, of=[Benchmark("x", [Pages()], [])])
    evaluate(model, tmp_path, step=9, budgets=[(1, 1)], of=[Benchmark("x", [Pages()], [])])
    assert len(evaluated) == 6
    assert sorted(path.name for path in (tmp_path / "mteb").iterdir()) == [
        f"{name}.json" for name in ("MorePages", "NoisePages", "OtherPages")
    ]


def test_figures_and_table(model, tmp_path):
    table = evaluate(model, tmp_path, budgets=BUDGETS[::-1])
    assert (tmp_path / "mteb.txt").read_text() == table + "\n"
    rows, scores = [line.split() for line in table.splitlines()], {}
    for task in (Pages(), OtherPages(), MorePages()):
        name, metric = task.metadata.name, task.metadata.main_score
        results = stored(tmp_path, name)[name]
        assert (results.name, results.data, results.metric) == (name, "revision 1", metric)
        assert (results.queries, results.documents, list(results.values())) == (2 * 7, 2 * 12, NAMES)
        scores[name] = [interval.mean for interval in results.values().values()]
        assert [f"{name},", metric, *(f"{100 * value:.1f}" for value in scores[name])] in rows
        for search, mean in zip(results.searches, scores[name], strict=True):
            assert search.metrics.keys() == {"ndcg_at_5", "ndcg_at_10"}
            theirs = mteb.evaluate(Searcher(model, SEARCHES[search.budget]), type(task)(), cache=None, show_progress_bar=False)
            assert theirs.task_results[0].get_score() == pytest.approx(mean, abs=1e-12)
    means = [f"{100 * value:.1f}" for value in np.mean([scores["NoisePages"], scores["OtherPages"]], axis=0)]
    assert (
        rows[0] == "first, main score (%) of 28 queries in 2 tasks".split()
        and rows[1] == ["task", *NAMES]
        and ["mean", "of", "2", "of", "3", "tasks", *means] in rows
    )
    assert "not retrieval of texts and images: SomethingElse" in table and "mean of 1 of 1 tasks" in table
    assert scores["NoisePages"] == scores["MorePages"] and len(set(scores["NoisePages"])) == 3


def test_the_files(model, tmp_path):
    table = evaluate(model, tmp_path, of=[Benchmark("pages", [Pages(), OtherPages(), ClosedPages()], ["<b>Else"])])
    tasks = stored(tmp_path, "NoisePages", "OtherPages")
    (board,) = json.loads((tmp_path / "mteb.json").read_text())["boards"]
    assert [from_json(TaskResults, content) for content in board["tasks"]] == list(tasks.values())
    for name in NAMES:
        mean = np.mean([task.values()[name].mean for task in tasks.values()])
        assert board["means"]["all"][name]["mean"] == pytest.approx(mean) and f"{100 * mean:.1f}" in table
    page = Page((tmp_path / "mteb.html").read_text(encoding="utf-8"))
    assert page.all("h1") == [({}, "small: pages")] and not page.all("b")
    heads = [text for attributes, text in page.all("th") if attributes["scope"] == "col"]
    assert heads == ["task", *NAMES] and "not in the plot" in page.all("caption")[0][1]
    cells = [text for _, text in page.all("td")]
    assert cells == [cell for line in table.splitlines()[2:7] for cell in line.split()[-3:] if "." in cell]
    assert {"not retrieval of texts and images: <b>Else", table.splitlines()[-1]} <= {text for _, text in page.all("small")}
    assert f"mteb {mteb.__version__}, " in page.all("footer")[0][1] and "step 8" in page.all("footer")[0][1]
    assert page.images()[0][1].format == "PNG" and len(page.images()) > 10


class EasyPages(Pages):
    """A task that no query can miss."""

    metadata = OtherPages.metadata.model_copy(update={"name": "EasyPages"})

    def split(self, subset, grades):
        return super().split(subset, np.ones_like(grades))


def test_a_resumed_evaluation_gives_the_same_page(model, tmp_path, monkeypatch):
    """And loads only what it shows."""

    def some():
        return [Benchmark("first", [EasyPages(), Pages()], []), Benchmark("second", [OtherPages(), MorePages()], [])]

    evaluate(model, tmp_path / "whole", of=some())
    (tmp_path / "resumed" / "mteb").mkdir(parents=True)
    for name in ("EasyPages", "OtherPages"):  # finished before the kill
        shutil.copy(tmp_path / "whole" / "mteb" / f"{name}.json", tmp_path / "resumed" / "mteb")
    evaluate(model, tmp_path / "resumed", of=some())
    loaded = []

    def load_data(task, *, load=Pages.load_data, **options):
        loaded.append(task.metadata.name)
        return load(task, **options)

    monkeypatch.setattr(Pages, "load_data", load_data)
    evaluate(model, tmp_path / "resumed", of=some())
    shown = Page((tmp_path / "whole" / "mteb.html").read_text(encoding="utf-8")).all("article")
    assert sorted(loaded) == sorted({text.split(" of 12 ")[1].split(",")[0] for _, text in shown}) and "EasyPages" not in loaded
    for name in ("mteb.html", "mteb.txt", "mteb.json"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_other_parts_of_a_task_do_not_count(model, tmp_path):
    english = Pages()
    english.hf_subsets = ["english"]

    def keys(task=None):
        evaluate(model, tmp_path, budgets=[(1, 1)], of=[Benchmark("x", [task or Pages()], [])])
        return json.loads((tmp_path / "mteb" / "NoisePages.json").read_text())["key"]

    both = keys()
    assert keys(english) != both == keys()


def test_stages_alone_have_no_plot(model, tmp_path):
    """And the worst queries are those of the last stage."""
    for name, budgets in (("stages", BUDGETS[2:]), ("plain", BUDGETS[1:2])):
        evaluate(model, tmp_path / name, budgets=budgets, of=[Benchmark("x", [Pages()], [])])
    stages, plain = (Page((tmp_path / name / "mteb.html").read_text(encoding="utf-8")) for name in ("stages", "plain"))
    assert stages.all("article") == plain.all("article") != []
    assert len(stages.images()) == len(plain.images()) - 1 and not [image for _, image in stages.images() if image.format == "PNG"]


def test_vidore():
    benchmarks = tasks.find("vidore")
    assert [benchmark.name for benchmark in benchmarks] == ["ViDoRe(v1)", "ViDoRe(v2)", "ViDoRe(v3)"]
    assert [len(benchmark.tasks) for benchmark in benchmarks] == [10, 4, 10] and not any(
        benchmark.others for benchmark in benchmarks
    )
    main_scores = [{task.metadata.main_score for task in benchmark.tasks} for benchmark in benchmarks]
    assert main_scores == [{"ndcg_at_5"}, {"ndcg_at_5"}, {"ndcg_at_10"}]


def test_any_benchmark_or_task():
    ((name, searched, others),) = tasks.find("NanoBEIR")
    assert name == "NanoBEIR" and len(searched) == 13 and not others
    ((name, searched, others),) = tasks.find("VidoreArxivQARetrieval")
    assert (name, [task.metadata.name for task in searched], others) == ("VidoreArxivQARetrieval", ["VidoreArxivQARetrieval"], [])
    ((_, searched, others),) = tasks.find("MTEB(eng, v2)")
    assert {"ArguAna"} < {task.metadata.name for task in searched} and "Banking77Classification" in others


@pytest.mark.parametrize(
    "name, message",
    [
        ("vidor", "the nearest are vidore"),
        ("ViDoRe v2", r"the nearest are .*ViDoRe\(v2\)"),
        ("vidorearxivqaretrievals", "the nearest are VidoreArxivQARetrieval"),
        ("%%%", "expected vidore, mmeb or a name that mteb lists"),
        ("Banking77Classification", "none of its tasks is retrieval"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(UserError, match=message) as caught:
        tasks.find(name)
    assert str(caught.value).startswith(f"{name}: ") and "\n" not in str(caught.value)


def test_without_mteb(monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(UserError, match=r"vidore needs mteb .*pip install 'metaembed-jax\[eval\]'"):
        tasks.find("vidore")


@pytest.mark.parametrize(
    "benchmark, files, message",
    [
        ("mmeb", None, "--benchmark=mmeb: expected the folder of MMEB-eval"),
        ("vidore", Path("x"), "--benchmark=vidore: x is not read: mteb fetches its own data"),
        (None, Path("x"), "--from=x: expected with --benchmark=mmeb only"),
        ("vidor", None, "the nearest are vidore"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, benchmark, files, message):
    with pytest.raises(UserError, match=message):
        evaluate_checkpoint(load_config("tests/training/small.py", {}), tmp_path, tmp_path, None, benchmark, files)


def test_the_hub_is_not_to_be_reached(model, tmp_path):
    """The suite is offline, and so is this task."""
    with pytest.raises(UserError) as caught:
        evaluate(model, tmp_path, of=tasks.find("VidoreArxivQARetrieval"))
    message = str(caught.value)
    assert message.startswith("VidoreArxivQARetrieval: mteb/arxivqa_test_subsampled_beir at 1797") and "\n" not in message
    assert "cannot be fetched from the Hugging Face hub" in message
    assert not list(tmp_path.iterdir())


def test_private_data_is_left_out(model, tmp_path):
    table = evaluate(model, tmp_path, budgets=[(1, 1)], of=[Benchmark("both", [ClosedPages(), Pages()], [])])
    assert "left out: ClosedPages: noise/pages at 1 is not public (DatasetNotFoundError: no such)" in table
    assert "mean of 1 of 2 tasks" in table and [path.name for path in (tmp_path / "mteb").iterdir()] == ["NoisePages.json"]
    both = evaluate(model, tmp_path, budgets=[(1, 1)], of=[Benchmark("none", [ClosedPages()], []), Benchmark("x", [Pages()], [])])
    assert both.splitlines()[:2] == ["none, main score (%) of 0 queries in 0 tasks", "task"]
    assert both.splitlines()[2].startswith("left out: Closed")
    with pytest.raises(UserError, match="ClosedPages: .* is not public"):
        evaluate(model, tmp_path, of=[Benchmark("none", [ClosedPages()], [])])


def test_a_budget_beyond_the_model(model, tmp_path):
    with pytest.raises(UserError, match="goes beyond"):
        evaluate(model, tmp_path, budgets=[((1, 1, 5), (17, 64))])
