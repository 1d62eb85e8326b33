"""All 36 tasks in both formats, evaluated, killed and run again; and bad files."""

import json
import os
import shutil

import numpy as np
import pytest

from metaembed_jax.check.references import maxsim_scores
from metaembed_jax.data.sources.image_files import ImageFolder
from metaembed_jax.data.sources.row_files import RowFiles
from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.evaluator import Subject
from metaembed_jax.evaluation.mmeb import evaluator
from metaembed_jax.evaluation.mmeb.evaluator import MEASURE, Mmeb
from metaembed_jax.evaluation.mmeb.reading import read_task
from metaembed_jax.evaluation.mmeb.tasks import GROUPS, TASKS
from metaembed_jax.evaluation.report import benchmark_names, write_report
from metaembed_jax.evaluation.tables import format_tables
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.results import Interval, SearchResults, TaskResults, from_json
from tests.data.field_files import mmeb_test_rows, picture, write_mmeb_test, write_parquet
from tests.evaluation.parsed_page import Page

BUDGETS = (Budget(1, 1), Budget(16, 64))
BY_NAME = {task.name: task for task in TASKS}


def evaluate(model, folder, out):
    """The table of a report that is written to `out`."""
    mmeb, subject = Mmeb(folder, BUDGETS), Subject(model=model, name="small", step=8, config={})
    results = mmeb.run(subject, out, progress=False)
    write_report(mmeb, subject, results, out, benchmark_names("mmeb"))
    return format_tables(results)


def test_all_tasks_survive_a_kill(model, tmp_path, monkeypatch):
    write_mmeb_test(tmp_path / "in", TASKS, second=True)
    evaluated = []

    def killed_at_the_third(*arguments, evaluate=evaluator.evaluate_task):
        evaluated.append(arguments[1].name)
        if len(evaluated) == 3:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(evaluator, "evaluate_task", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tmp_path / "in", tmp_path / "out")
    table = evaluate(model, tmp_path / "in", tmp_path / "out")
    assert len(evaluated) == 37 and evaluated[2] == evaluated[3]
    page = (tmp_path / "out" / "mmeb.html").read_bytes()
    assert evaluate(model, tmp_path / "in", tmp_path / "out") == table and len(evaluated) == 37
    assert (tmp_path / "out" / "mmeb.html").read_bytes() == page
    (board,) = json.loads((tmp_path / "out" / "mmeb.json").read_text())["boards"]
    tasks = {task["name"]: from_json(TaskResults, task) for task in board["tasks"]}
    assert set(tasks) == set(BY_NAME) and (tmp_path / "out" / "mmeb.txt").read_text() == table + "\n"
    members = {group: [task for task in TASKS if task.group == group] for group in GROUPS} | {"all": TASKS}
    members |= {name: [t for t in TASKS if t.in_domain == here] for name, here in (("in domain", True), ("out of domain", False))}
    assert board["means"].keys() == members.keys()
    for name, of_mean in members.items():
        mean = np.mean([tasks[task.name].values()["16:64"].mean for task in of_mean])
        assert board["means"][name]["16:64"]["mean"] == pytest.approx(mean)
    assert not list((tmp_path / "out" / "mmeb" / "embeddings").iterdir())
    assert "published: MetaEmbed-7B" in table and "76.6" in table


def test_the_page_has_the_worst_of_all_tasks_and_reads_no_other_image(model, tmp_path, monkeypatch):
    """A killed and resumed evaluation gives the page of an uninterrupted one."""
    tasks = [BY_NAME[name] for name in ("ChartQA", "WebQA", "CIRR", "NIGHTS", "GQA")]
    write_mmeb_test(tmp_path / "in", tasks, count=6)
    evaluate(model, tmp_path / "in", tmp_path / "whole")
    page = Page((tmp_path / "whole" / "mmeb.html").read_text(encoding="utf-8"))
    stored = {task.name: json.loads((tmp_path / "whole" / "mmeb" / f"{task.name}.json").read_text()) for task in tasks}
    tasks = [from_json(TaskResults, content) for content in stored.values()]
    assert all(len(task.failures) == round(6 * (1 - task.values()["16:64"].mean)) for task in tasks)
    misses = sorted((failure.rank for task in tasks for failure in task.failures), reverse=True)
    shown = [text for _, text in page.all("article")]
    assert len(shown) == 10 < len(misses)
    assert [int(text.split("Rank ")[1].split(" of 3 ")[0]) - 1 for text in shown] == misses[:10]
    assert all(text.split(", query")[0].split(" of 3 ")[1] in stored for text in shown)
    assert "30 queries in 5 tasks" in page.all("caption")[0][1] and "published: MetaEmbed-7B" in page.all("table")[0][1]
    assert "MMEB, " in page.all("footer")[0][1] and "step 8" in page.all("footer")[0][1]

    (tmp_path / "resumed" / "mmeb").mkdir(parents=True)
    for name in ("WebQA", "ChartQA"):  # finished before the kill
        (tmp_path / "resumed" / "mmeb" / f"{name}.json").write_text(json.dumps(stored[name]))
    evaluate(model, tmp_path / "in", tmp_path / "resumed")
    read = []

    def counted(folder, path, column, original=ImageFolder.image):
        read.append(path)
        return original(folder, path, column)

    monkeypatch.setattr(ImageFolder, "image", counted)
    evaluate(model, tmp_path / "in", tmp_path / "resumed")
    assert (tmp_path / "resumed" / "mmeb.html").read_bytes() == (tmp_path / "whole" / "mmeb.html").read_bytes()
    assert 0 < len(read) == len(page.images()) - 1


@pytest.mark.parametrize("zipped", [False, True])
def test_a_task_whose_images_change_is_another_one(tmp_path, zipped):
    fingerprints = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        write_mmeb_test(folder, [BY_NAME["ChartQA"]])
        image = folder / "eval_images/ChartQA/0.jpg"
        image.write_bytes(picture(7 * number))
        os.utime(image, ns=(0, number * 10**18))
        if zipped:
            shutil.make_archive(folder / "eval_images", "zip", folder / "eval_images")
            shutil.rmtree(folder / "eval_images")
        fingerprints.append(read_task(BY_NAME["ChartQA"], folder).fingerprint)
    assert fingerprints[0] != fingerprints[1]


def test_all_tasks_of_the_first_format_are_read(tmp_path):
    write_mmeb_test(tmp_path, TASKS)
    for task in TASKS:
        questions = read_task(task, tmp_path)
        assert len(questions.queries) == len(questions.documents) == 4 and all(len(chosen) == 3 for chosen in questions.choices)
        assert ("image" in questions.queries[0]) == (task.kind != "t2i")
        assert ("image" in questions.documents[0]) == (task.kind in ("t2i", "i2i"))


def test_precision_is_that_of_the_scores(model, tmp_path):
    tasks = [BY_NAME[name] for name in ("ChartQA", "WebQA", "CIRR")]
    write_mmeb_test(tmp_path, tasks, count=6)
    for task in tasks:
        questions = read_task(task, tmp_path)
        vectors = (
            model.encode_query(evaluator.Pictured(questions.queries, questions.images)),
            model.encode_document(evaluator.Pictured(questions.documents, questions.images)),
        )
        scores = maxsim_scores(vectors[0], vectors[1])
        right = [np.argmax([row[number] for number in chosen]) == 0 for row, chosen in zip(scores, questions.choices, strict=True)]
        results = evaluator.evaluate_task(model, task, questions, BUDGETS, tmp_path / "cache" / task.name, False)
        assert results.values()["16:64"].mean == np.mean(right) and results.chance == pytest.approx(1 / 3)


def test_a_tie_is_a_miss():
    scores = np.array([[1.0, 1.0, 0.0], [2.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert evaluator.first_choices(scores, [[0, 1, 2], [0, 1, 2], [1]]).tolist() == [False, True, True]

    def task(*precisions):
        searches = [SearchResults(budget=f"{n}:{n}", metrics={MEASURE: Interval(value)}) for n, value in enumerate(precisions)]
        facts = {"name": "x", "metric": MEASURE, "documents": 4, "dimension": 8, "data": ""}
        return TaskResults(**facts, queries=100, searches=tuple(searches), chance=0.25)

    assert task(0.3).is_like_chance() and not task(0.2, 0.4).is_like_chance()


def test_equal_targets_are_one_document(tmp_path):
    write_mmeb_test(tmp_path, [BY_NAME["ChartQA"], BY_NAME["RefCOCO-Matching"]], count=4)
    rows = mmeb_test_rows(BY_NAME["ChartQA"], 4, False)
    rows[1] |= {"tgt_text": ["same", "same", "answer 0"]}
    write_parquet(tmp_path / "ChartQA" / "test-00000-of-00001.parquet", rows)
    questions = read_task(BY_NAME["ChartQA"], tmp_path)
    assert [document["text"] for document in questions.documents] == ["answer 0", "answer 1", "answer 2", "same", "answer 3"]
    assert questions.choices == [[0, 1, 2], [3, 0], [2, 0, 1], [4, 0, 1]]
    assert len(read_task(BY_NAME["RefCOCO-Matching"], tmp_path).documents) == 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tgt_text": [], "tgt_img_path": []}, "tgt_text and tgt_img_path are empty"),
        ({"tgt_text": ["a"], "tgt_img_path": ["", ""]}, "tgt_text has 1 entries and tgt_img_path 2: expected equal numbers"),
        ({"qry_img_path": "ChartQA/9.jpg"}, "eval_images/ChartQA/9.jpg is missing"),
        ({"qry_img_path": "../x"}, "leads out of"),
        ({"qry_img_path": ""}, "no image next to it"),
        ({"qry_text": "no mark"}, "qry_text 'no mark' has no mark <|image_1|>, and an image next to it"),
        ({"qry_text": "", "qry_img_path": ""}, "qry_text is empty, and has no image"),
        ({"tgt_text": ["", "b", "c"]}, "tgt_text is empty, and has no image"),
    ],
)
def test_bad_rows(tmp_path, change, message):
    write_mmeb_test(tmp_path, [BY_NAME["ChartQA"]])
    rows = mmeb_test_rows(BY_NAME["ChartQA"], 4, False)
    rows[2] |= change
    file = tmp_path / "ChartQA" / "test-00000-of-00001.parquet"
    write_parquet(file, rows)
    with pytest.raises(UserError) as caught:
        read_task(BY_NAME["ChartQA"], tmp_path)
    assert f"{file}, row 2: " in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize("value", [0, False, [], 0.0, {"path": 1}])
@pytest.mark.parametrize("column", ["qry_text", "qry_img_path", "tgt_text", "tgt_img_path"])
def test_values_of_other_types(tmp_path, monkeypatch, column, value):
    """A value that is no string is not read as an absent one."""
    write_mmeb_test(tmp_path, [BY_NAME["ChartQA"]])
    listed = column.startswith("tgt")
    rows = [row | {column: [value] * 3 if listed else value} for row in mmeb_test_rows(BY_NAME["ChartQA"], 4, False)]
    monkeypatch.setattr(RowFiles, "read", lambda *_: iter(rows))
    with pytest.raises(UserError, match=rf"row 0: {column} (is|.* has)"):
        read_task(BY_NAME["ChartQA"], tmp_path)
    rows[0][column] = value
    if value != [] or not listed:
        with pytest.raises(UserError, match=rf"row 0: {column} (is|.* has)"):
            read_task(BY_NAME["ChartQA"], tmp_path)


def test_missing_columns(tmp_path):
    write_mmeb_test(tmp_path, [BY_NAME["ChartQA"]])
    file = tmp_path / "ChartQA" / "test-00000-of-00001.parquet"
    rows = mmeb_test_rows(BY_NAME["ChartQA"], 4, False)
    write_parquet(file.with_name("test-00001.parquet"), [{"qry_text": row["qry_text"], "tgt_text": []} for row in rows])
    with pytest.raises(
        UserError, match="test-00001.parquet lacks the column qry_img_path, tgt_img_path; it has qry_text, tgt_text"
    ):
        read_task(BY_NAME["ChartQA"], tmp_path)


def test_a_folder_of_something_else(model, tmp_path):
    with pytest.raises(UserError, match="expected {task}/test-"):
        evaluate(model, tmp_path, tmp_path / "out")
