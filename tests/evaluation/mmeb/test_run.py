"""All 36 tasks in both formats, evaluated, killed and run again; and bad files."""

import json

import numpy as np
import pytest

from metaembed_jax.config import load_config, model_config
from metaembed_jax.data import tokenizer
from metaembed_jax.data.images import ImageConfig
from metaembed_jax.data.prompts import Processor
from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.mmeb import run
from metaembed_jax.evaluation.mmeb.reading import read_task
from metaembed_jax.evaluation.mmeb.tasks import GROUPS, TASKS
from metaembed_jax.model import MetaEmbed
from metaembed_jax.network import init_parameters
from metaembed_jax.sharding import make_mesh
from tests.data.field_files import mmeb_test_rows, write_mmeb_test, write_parquet
from tests.late_interaction.reference import maxsim_scores

BUDGETS = ((1, 1), (16, 64))
BY_NAME = {task.name: task for task in TASKS}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = load_config("tests/training/small.py", {})
    learned = tokenizer.train(["answer", "text"], tmp_path_factory.mktemp("tokenizer") / "tokenizer.json", vocabulary=700)
    parameters = init_parameters(model_config(config), 0)
    return MetaEmbed(
        model_config(config), parameters, Processor(learned, ImageConfig(28 * 28, 84 * 84, window_size=84)), make_mesh()
    )


def test_all_tasks_survive_a_kill(model, tmp_path, monkeypatch):
    write_mmeb_test(tmp_path / "in", TASKS, second=True)
    evaluated = []

    def killed_at_the_third(*arguments, evaluate=run.evaluate_task):
        evaluated.append(arguments[3].name)
        if len(evaluated) == 3:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(run, "evaluate_task", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(model, "a", tmp_path / "in", BUDGETS, tmp_path / "out", progress=False)
    table = run.evaluate(model, "a", tmp_path / "in", BUDGETS, tmp_path / "out", progress=False)
    assert len(evaluated) == 37 and evaluated[2] == evaluated[3]
    assert run.evaluate(model, "a", tmp_path / "in", BUDGETS, tmp_path / "out", progress=False) == table and len(evaluated) == 37
    found = json.loads((tmp_path / "out" / "mmeb.json").read_text())
    assert set(found["tasks"]) == set(BY_NAME) and (tmp_path / "out" / "mmeb.txt").read_text() == table + "\n"
    members = {group: [task for task in TASKS if task.group == group] for group in GROUPS} | {"all": TASKS}
    members |= {name: [t for t in TASKS if t.in_domain == here] for name, here in (("in domain", True), ("out of domain", False))}
    assert found["averages"].keys() == members.keys()
    for name, tasks in members.items():
        mean = np.mean([found["tasks"][task.name]["precision"]["16:64"] for task in tasks])
        assert found["averages"][name]["16:64"] == pytest.approx(mean)
    assert not list((tmp_path / "out" / "mmeb" / "embeddings").iterdir())
    assert "published: MetaEmbed-7B" in table and "76.6" in table


def test_all_tasks_of_the_first_format_are_read(tmp_path):
    write_mmeb_test(tmp_path, TASKS)
    for task in TASKS:
        questions = read_task(task, tmp_path)
        assert len(questions.queries) == len(questions.candidates) == 4 and all(len(chosen) == 3 for chosen in questions.choices)
        assert ("image" in questions.queries[0]) == (task.kind != "t2i")
        assert ("image" in questions.candidates[0]) == (task.kind in ("t2i", "i2i"))


def test_precision_is_that_of_the_scores(model, tmp_path):
    tasks = [BY_NAME[name] for name in ("ChartQA", "WebQA", "CIRR")]
    write_mmeb_test(tmp_path, tasks, count=6)
    for task in tasks:
        questions = read_task(task, tmp_path)
        vectors = (
            model.encode_query(run.Pictured(questions.queries, questions.images)),
            model.encode_document(run.Pictured(questions.candidates, questions.images)),
        )
        scores = maxsim_scores(vectors[0], vectors[1])
        right = [np.argmax([row[one] for one in chosen]) == 0 for row, chosen in zip(scores, questions.choices, strict=True)]
        done = run.evaluate_task(model, questions, BUDGETS, tmp_path / "cache" / task.name, False)
        assert done["precision"]["16:64"] == np.mean(right) and done["chance"] == pytest.approx(1 / 3)


def test_a_tie_is_a_miss():
    scores = np.array([[1.0, 1.0, 0.0], [2.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert run.first_choices(scores, [[0, 1, 2], [0, 1, 2], [1]]).tolist() == [False, True, True]
    assert run.is_like_chance({"chance": 0.25, "queries": 100, "precision": {"1:1": 0.3}})
    assert not run.is_like_chance({"chance": 0.25, "queries": 100, "precision": {"1:1": 0.2, "16:64": 0.4}})


def test_equal_targets_are_one_candidate(tmp_path):
    write_mmeb_test(tmp_path, [BY_NAME["ChartQA"], BY_NAME["RefCOCO-Matching"]], count=4)
    rows = mmeb_test_rows(BY_NAME["ChartQA"], 4, False)
    rows[1] |= {"tgt_text": ["same", "same", "answer 0"]}
    write_parquet(tmp_path / "ChartQA" / "test-00000-of-00001.parquet", rows)
    questions = read_task(BY_NAME["ChartQA"], tmp_path)
    assert [one["text"] for one in questions.candidates] == ["answer 0", "answer 1", "answer 2", "same", "answer 3"]
    assert questions.choices == [[0, 1, 2], [3, 0], [2, 0, 1], [4, 0, 1]]
    assert len(read_task(BY_NAME["RefCOCO-Matching"], tmp_path).candidates) == 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tgt_text": [], "tgt_img_path": []}, "tgt_text and tgt_img_path are empty"),
        ({"tgt_text": ["a"], "tgt_img_path": ["", ""]}, "tgt_text has 1 entries and tgt_img_path 2"),
        ({"qry_img_path": "ChartQA/9.jpg"}, "eval_images/ChartQA/9.jpg is missing"),
        ({"qry_img_path": "../x"}, "leads out of"),
        ({"qry_img_path": ""}, "no image stands beside it"),
        ({"qry_text": "no mark"}, "qry_text 'no mark' has no mark <|image_1|>, and an image stands beside it"),
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


def test_missing_columns(tmp_path):
    write_mmeb_test(tmp_path, [BY_NAME["ChartQA"]])
    file = tmp_path / "ChartQA" / "test-00000-of-00001.parquet"
    rows = mmeb_test_rows(BY_NAME["ChartQA"], 4, False)
    write_parquet(file.with_name("test-00001.parquet"), [{"qry_text": row["qry_text"], "tgt_text": []} for row in rows])
    with pytest.raises(
        UserError, match="test-00001.parquet: lacks the column qry_img_path, tgt_img_path; it has qry_text, tgt_text"
    ):
        read_task(BY_NAME["ChartQA"], tmp_path)


def test_a_folder_of_something_else(model, tmp_path):
    with pytest.raises(UserError, match="has no {task}/test-"):
        run.evaluate(model, "a", tmp_path, BUDGETS, tmp_path / "out", progress=False)
