"""Wrong flags of the commands: one line on stderr, exit code 2, nothing written."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from metaembed_jax import cli
from metaembed_jax.flags import run_main

ROOT = Path(__file__).parents[1]
TINY = "--config=configs/tiny.py"
WRONG = [
    (["train.py"], "the following arguments are required: --config"),
    (["train.py", "--config=configs/none.py"], "configs/none.py: no such file"),
    (["train.py", "--config=configs/../README.md"], "configs/../README.md: is no config"),
    (["train.py", TINY, "--config.microbatch_rows=-1"], "config.microbatch_rows=-1 must not be negative"),
    (["train.py", TINY, "--config.unroll_layers=0"], "config.unroll_layers=0 must be positive"),
    (["train.py", TINY, "--config.embedding_dim=-1"], "config.embedding_dim=-1 must not be negative"),
    (["train.py", TINY, "--config.trained=(1,2)"], "config.trained: 1 is not of the form ('*', 'full')"),
    (["train.py", TINY, "--config.data.sources=()"], "config.data.sources: () is not of the form"),
    (["train.py", TINY, "--config.row=(64,)"], "config.row=(64,): expected (tokens, patches)"),
    (["train.py", TINY, "--config.init_from=none.py"], "config.init_from: none.py: no such file"),
    (["train.py", TINY, "--stesp=3"], "unrecognized arguments: --stesp=3"),
    (["train.py", TINY, "--config.stesp=3"], "--config.stesp: no such key; there are"),
    (["train.py", TINY, "--config.save_minutes=1e400"], "--config.save_minutes=1e400: expected float, as in 15.0"),
    (["train.py", TINY, "--config.steps=many"], "--config.steps=many: expected int"),
    (["train.py", TINY, "--config.steps"], "write --config.steps=VALUE"),
    (["train.py", TINY, "--config.optimizer.algorithm=sgd"], "config.optimizer.algorithm='sgd': expected adamw or muon"),
    (["train.py", TINY, "--config.groups=((1,1),(32,64))"], "goes beyond the vectors"),
    (["train.py", TINY, "--config.groups=((2,4),(1,8))"], "groups not nested"),
    (["train.py", TINY, "--config.mesh.data=3"], "config.mesh (data=3, fsdp=1, tensor=1) does not fit"),
    (["train.py", TINY, "--hosts=2"], "--coordinator, --hosts and --host belong together"),
    (["train.py", TINY, "--coordinator=here", "--hosts=2", "--host=0"], "expected ADDRESS:PORT"),
    (["eval.py", TINY, "--coordinator=here:1", "--hosts=2", "--host=2", "--checkpoint=x"], "0 <= host < hosts"),
    (["eval.py", TINY, "--checkpoint=nowhere"], "nowhere is no run of train.py"),
    (["metaembed_jax"], "the following arguments are required: command"),
    (["metaembed_jax", "export", "--checkpoint=no/where", "--out=out", "--format=peft"], "no/where: there is no such directory"),
    (["metaembed_jax", "export", "--checkpoint=x", "--out=out", "--format=onnx"], "invalid choice: 'onnx'"),
    (["metaembed_jax", "index", "--model=x", "--input=none", "--out=out"], "none: no such file or folder"),
    (["metaembed_jax", "search", "--index=none", "a"], "none is no index: it has no manifest.json"),
    (["metaembed_jax", "search", "--index=none"], "nothing to search for"),
    (["metaembed_jax", "plot", "none.json"], "none.json: cannot be read"),
    (["metaembed_jax", "prepare", "--source=cats"], "no source 'cats'; there are icons, boards"),
]


@pytest.mark.parametrize("command, message", WRONG, ids=[" ".join(command) for command, _ in WRONG])
def test_wrong_flags(tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax.distributed, "initialize", alone)  # it must come before JAX has devices, and here it has
    program, *flags = [part.replace("configs/", f"{ROOT}/configs/") for part in command]
    monkeypatch.setattr(sys, "argv", [program, *flags])
    with pytest.raises(SystemExit) as stopped:
        run_main(main_of(program))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message.replace("configs/", f"{ROOT}/configs/") in line
    assert not any(tmp_path.iterdir())


def alone(*_):
    raise ValueError("no cluster")


def main_of(program: str):
    """The main function of a script in the root, or of the package."""
    if program == "metaembed_jax":
        return cli.main
    spec = importlib.util.spec_from_file_location(program.removesuffix(".py"), ROOT / program)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize("command", [["train.py"], ["-m", "metaembed_jax", "prepare"]])
def test_help(command):
    done = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "usage:" in done.stdout
