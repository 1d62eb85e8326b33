"""The config of a run: its allowed values, flags and files that set them, and its record."""

import dataclasses
import json
import re

import numpy as np
import pytest

from metaembed_jax.config import (
    DataConfig,
    ModelSettings,
    ObjectivesConfig,
    RowsConfig,
    RunConfig,
    ScheduleConfig,
    load_config,
    with_keys,
)
from metaembed_jax.config.keys import apply_flags
from metaembed_jax.config.record import FREE_KEYS, REPLANNED_KEYS, fixed, flat, from_record, is_in, to_record
from metaembed_jax.config.section import leaf_keys
from metaembed_jax.errors import UserError

ARCHITECTURE = {"text_config": {"hidden_size": 8, "mrope_section": (1, 2, 3)}, "scale": 0.5}


@pytest.fixture(scope="module")
def config():
    return with_keys(RunConfig(), {"model.architecture": ARCHITECTURE})


@pytest.mark.parametrize(
    "key, text, expected",
    [
        ("rows.batch_size", "64", 64),
        ("rows.size", "(1536, 5120)", (1536, 5120)),
        ("rows.size", "()", ()),
        ("schedule.trace_steps", "3,5", (3, 5)),
        ("data.sources", "(('a', 2, 0), ('b', 0.5, 9))", (("a", 2, 0), ("b", 0.5, 9))),
        ("data.augment", "true", True),
        ("data.augment", "False", False),
        ("optimizer.learning_rate", "1e-3", 1e-3),
        ("optimizer.weight_decay", "1", 1.0),
        ("name", "7", "7"),
        ("model.frozen_dtype", "int8", "int8"),
        ("model.architecture.text_config.hidden_size", "16", 16),
    ],
)
def test_flags_are_parsed_by_the_type_of_their_key(config, key, text, expected):
    node = apply_flags(config, {key: text})
    for name in key.split("."):
        node = node[name] if isinstance(node, dict) else getattr(node, name)
    assert node == expected and type(node) is type(expected)


WRONG = {
    "batch_size=3": "--config.batch_size: no such key; did you mean rows.batch_size?",
    "rows.batchsize=3": "--config.rows.batchsize: no such key; nearest: rows.batch_size",
    "nonsense=3": "--config.nonsense: no such key; expected one of name, seed, init_from, model.*, rows.*",
    "rows=3": "--config.rows: a group of keys; expected one of rows.size, rows.batch_size",
    "model.architecture=3": "--config.model.architecture: a group of keys",
    "model.architecture.nonsense=3": "--config.model.architecture.nonsense: no such key",
    "rows.batch_size=-1": "config.rows.batch_size=-1: expected a positive integer",
    "rows.batch_size=1.0": "config.rows.batch_size=1.0: expected a positive integer",
    "rows.batch_size=True": "config.rows.batch_size=True: expected a positive integer",
    "rows.batch_size=many": "config.rows.batch_size='many': expected a positive integer",
    "rows.size=(64,)": "config.rows.size=(64,): expected () or (a positive integer, a non-negative integer)",
    "data.augment=1": "config.data.augment=1: expected true or false",
    "data.sources=(('a',1),)": "config.data.sources[0]=('a', 1): expected (a text, a positive number, a non-negative integer)",
    "data.sources=()": "config.data.sources=(): expected at least one",
    "model.trained=()": "config.model.trained=(): expected at least one",
    "model.lora.dropout=1": "config.model.lora.dropout=1.0: expected a number from 0 to below 1",
    "model.dtype=fp8": "config.model.dtype='fp8': expected 'float32' or 'bfloat16'",
    "schedule.save_minutes=1e400": "config.schedule.save_minutes=inf: expected a non-negative number",
    "optimizer.eps=1e400": "config.optimizer.eps=inf: expected a positive number",
    "optimizer.learning_rate=-1": "config.optimizer.learning_rate=-1.0: expected a positive number",
    "optimizer.b1=1": "config.optimizer.b1=1.0: expected a number from 0 to below 1",
    "seed=9223372036854775808": "config.seed=9223372036854775808: expected at most 9223372036854775807",
    f"data.sources=(('a',1{'0' * 400},0),)": "config.data.sources[0]=('a', 1000",
    "schedule.exports=('../x',)": "config.schedule.exports[0]='../x': expected 'transformers' or",
    "schedule.trace_steps=(5,3)": "config.schedule.trace_steps=(5, 3): expected (first, last) with first <= last",
    "schedule.steps=500": "config.optimizer.warmup_steps=500: expected fewer than config.schedule.steps=500",
    "schedule.exports=('peft',)": "peft stores adapters",
    "objectives.matryoshka.groups=((1,1),(32,64))": "goes beyond the vectors",
    "init_from=s3://b/x": "no other scheme",
    "data.dir=gs://b/x": "gcloud storage cp",
}


@pytest.mark.parametrize("flag", WRONG)
def test_wrong_flags_are_refused(config, flag):
    key, _, text = flag.partition("=")
    with pytest.raises(UserError, match=re.escape(WRONG[flag])):
        apply_flags(config, {key: text})


def test_values_that_need_each_other_change_together(config):
    changed = apply_flags(config, {"schedule.steps": "20", "optimizer.warmup_steps": "10"})
    assert (changed.schedule.steps, changed.optimizer.warmup_steps) == (20, 10)
    with pytest.raises(UserError, match="warmup_steps=500: expected fewer"):
        with_keys(config, {"schedule.steps": 20})


def test_values_are_checked_where_they_are_made(config):
    with pytest.raises(UserError, match="config.data.sources=\\['icons'\\]: expected a tuple of"):
        DataConfig(sources=["icons"])
    for value, misfit in ((float("nan"), "nan"), (np.int64(3), "np.int64(3)"), ({1}, "{1}"), (10**400, "1000")):
        with pytest.raises(UserError, match=re.escape(f"config.model.architecture.text.sizes[1]={misfit}")):
            ModelSettings(architecture={"text": {"sizes": [1, value]}})
    with pytest.raises(UserError, match="config.rows.batch_size=0"):
        dataclasses.replace(config.rows, batch_size=0)
    with pytest.raises(UserError, match="config.schedule=RowsConfig"):
        dataclasses.replace(config, schedule=RowsConfig())
    with pytest.raises(UserError, match="config.objectives: all are None"):
        ObjectivesConfig(matryoshka=None)
    with pytest.raises(UserError, match="unknown key 'bach_size'"):
        with_keys(config, {"rows.bach_size": 3})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rows.batch_size = 3
    assert type(ScheduleConfig(save_minutes=3).save_minutes) is float
    assert config.objectives.largest_budget == (16, 64)


@pytest.mark.parametrize(
    "body, message",
    [
        ("RunConfig(rows=RowsConfig(bach_size=3))", "TypeError: .*bach_size"),
        ("3", "get_config returns a int; expected a metaembed_jax.config.RunConfig"),
        ("RunConfig(rows=RowsConfig(batch_size=0))", "config.rows.batch_size=0"),
        ("exit(0)", "SystemExit: 0"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_files_that_give_no_config_are_refused_in_a_line(tmp_path, body, message):
    file = tmp_path / "one.py"
    file.write_text(f"from metaembed_jax.config import *\nget_config = lambda arg: {body}\n")
    with pytest.raises(UserError, match=message) as refused:
        load_config(str(file))
    assert "\n" not in str(refused.value)


def test_a_record_is_json_and_gives_the_config_back(config):
    record = json.loads(json.dumps(to_record(config)))
    assert from_record(record) == config and record["model"]["architecture"]["text_config"]["mrope_section"] == [1, 2, 3]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rows": None}, "config.rows=None: expected a RowsConfig"),
        ({"rows": 3}, "config.rows=3: expected a RowsConfig"),
        ({"extra": 3}, "config.extra is not a key"),
        ({"optimizer": {"b1": 0.9}}, "config.optimizer.algorithm is missing"),
        ({"seed": "0"}, "config.seed='0': expected a non-negative integer"),
        ({"seed": [1]}, r"config.seed=\(1,\)"),
        ({"model": {"architecture": 3}}, "config.model.backbone is missing"),
        ({"objectives": {"matryoshka": None}}, "all are None"),
    ],
)
def test_records_of_something_else_are_refused(config, changes, message):
    with pytest.raises(UserError, match=message):
        from_record(to_record(config) | changes)
    for record in (None, 3, [], "x", {}):
        with pytest.raises(UserError, match="config"):
            from_record(record)


def test_a_run_keeps_each_key_that_no_start_may_change(config):
    keys = leaf_keys(RunConfig)
    for entry in FREE_KEYS + REPLANNED_KEYS:
        assert any(is_in(key, (entry,)) for key in keys), f"no config key {entry}"
    assert not any(is_in(key, FREE_KEYS) for key in REPLANNED_KEYS)
    kept = set(fixed(config))
    assert kept < set(flat(to_record(config))) and {"seed", "rows.size", "model.architecture.scale", "data.sources"} <= kept
    assert not kept & {"name", "schedule.steps", "mesh.data", "evaluation.validate_every"}


def test_a_relative_start_is_found_next_to_its_config(tmp_path, monkeypatch):
    """From any folder; one in the folder of the command comes first."""
    body = "from metaembed_jax.config import RunConfig\n\ndef get_config(arg=None):\n    return RunConfig(init_from={!r})\n"
    (tmp_path / "mine/model").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for start in ("first.py:arg", "model", "tiny:base", "no/model", "../mine", "gs://b/mine"):
        (tmp_path / "mine/config.py").write_text(body.format(start))
        (tmp_path / "mine/first.py").touch()
        found = {"first.py:arg": f"{tmp_path}/mine/first.py:arg", "model": f"{tmp_path}/mine/model"}.get(start, start)
        assert load_config(f"{tmp_path}/mine/config.py").init_from == found
    (tmp_path / "elsewhere/model").mkdir()
    (tmp_path / "mine/config.py").write_text(body.format("model"))
    assert load_config("../mine/config.py").init_from == "model"
    with pytest.raises(
        UserError, match=f"mine.py: no such file or config; expected .*, or a file .{tmp_path}/elsewhere/mine.py does"
    ):
        load_config("mine.py")


def test_the_middle_of_a_long_value_is_left_out():
    with pytest.raises(UserError) as caught:
        RunConfig(name="x" * 5, data=DataConfig(sources=(("a", 1.0, "b" * 9999),)))
    assert len(str(caught.value)) < 300 and " ... " in str(caught.value) and "expected" in str(caught.value)
    assert len(str(UserError("a" * 3000 + "; remove it"))) <= 1000 and str(UserError("a" * 3000 + "; remove it")).endswith(
        "remove it"
    )
