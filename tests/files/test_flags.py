"""Path flags of all commands: a folder, gs:// if the command supports it, no other scheme; no file of such a name is made."""

import argparse
import importlib.util
import re
import sys

import pytest

from metaembed_jax import cli, files
from metaembed_jax.checkpoints.workdir import default_workdir
from metaembed_jax.config import load_config
from metaembed_jax.errors import UserError
from metaembed_jax.flags import any_path, local_path, model_name
from metaembed_jax.model import MetaEmbed
from metaembed_jax.retrieval.index import Index
from tests.test_commands import ROOT

# Flags that are texts and no paths. A new flag is of one of the types for paths, or is listed here.
TEXTS = {
    "--config",
    "--coordinator",
    "--budgets",
    "--budget",
    "--benchmark",
    "--source",
    "--topology",
    "query",
    "--only",
    "--search",
    "--first",
    "--last",
    "--to",
    "--collection",
    "--out",  # of mine: the name of a source
}


def all_flags():
    """Return (command, flag) of every flag that takes a value."""
    for command in cli.COMMANDS:
        (commands,) = (action for action in cli.make_parser(command)._actions if isinstance(action, argparse._SubParsersAction))
        yield from ((command, action) for action in commands.choices[command]._actions if action.nargs != 0)


FLAGS = list(all_flags())
PATHS = [(command, action) for command, action in FLAGS if action.type in (any_path, local_path, model_name)]


def name_of(action):
    return action.option_strings[0] if action.option_strings else action.dest


def test_every_flag_is_a_path_or_known_to_be_none():
    on_disks = {f"{command} {name_of(action)}" for command, action in PATHS if action.type is local_path}
    expected = {"prepare --from", "prepare --out", "eval --from", "index --input", "index --out", "search --index"}
    expected |= {"search --image", "calibrate --index", "calibrate --queries", "upload --index", "mine --data"}
    assert on_disks == expected
    for command, action in FLAGS:
        if action.type is None and action.choices is None:
            assert name_of(action) in TEXTS, f"{command} {name_of(action)}: give it the type of a path, or list it"
        assert action.type is not files.Path


@pytest.mark.parametrize("command, action", PATHS, ids=[f"{command} {name_of(action)}" for command, action in PATHS])
def test_other_schemes_and_buckets(command, action, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def refused(path):
        value = f"{action.option_strings[0]}={path}" if action.option_strings else path
        monkeypatch.setattr(sys, "argv", ["metaembed", command, value])
        with pytest.raises(SystemExit) as stopped:
            cli.run()
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert not any(tmp_path.iterdir())
        return line

    # The last ones: an export to a whole bucket would replace the bucket; TensorStore writes a?b to a.
    for path in ("s3://b/x", "file:///x", "runs/https://x", "gs:/b/x", "gs:///x", "gs://b", "gs://b/", "gs://b/a?b", "gs://b/a//b"):
        assert re.search(rf"{name_of(action)}: {re.escape(path)}[: ]", refused(path))
    if action.type is local_path:
        assert "gcloud storage cp -r gs://b/x DIR" in refused("gs://b/x")
    elif action.type is any_path:
        assert str(any_path("gs://b/x")) == "gs://b/x"
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert "pip install 'metaembed-jax[gcs]'" in refused("gs://b/x")


def test_paths_in_configs_and_calls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key, path, message in (
        ("init_from", "s3://b/x", "no other scheme"),
        ("data.dir", "s3://b/x", "no other scheme"),
        ("data.dir", "gs://b/x", "gcloud storage cp -r gs://b/x DIR"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(f"{ROOT}/tests/training/small.py", {key: path})
    for char in files.SPECIAL + "\n":
        with pytest.raises(UserError, match="expected names in the bucket without"):
            files.any_path(f"gs://b/x/a{char}b")
    for name in ("gs://b/x", "../x", "..", ""):
        with pytest.raises(UserError, match="config.name=.*: expected the name of a folder"):
            default_workdir(name)
    with pytest.raises(UserError, match="no other scheme"):
        MetaEmbed.from_pretrained("s3://b/x")
    with pytest.raises(UserError, match="pathlib.Path drops a slash"):
        MetaEmbed.from_pretrained(files.Path("gs://b/x"))
    with pytest.raises(UserError, match="gcsfuse --implicit-dirs b DIR"):
        Index.load("gs://b/x")
    assert not any(tmp_path.iterdir())
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="gcloud storage cp -r gs://b/x DIR"):
        load_config("configs/smoke.py:gs://b/x")
