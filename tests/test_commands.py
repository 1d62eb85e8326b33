"""Wrong flags of the commands: one line on stderr, exit code 2, nothing written."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from metaembed_jax import cli, commands
from metaembed_jax.config import load_config, names_config

ROOT = Path(__file__).parents[1]
TINY = "--config=configs/tiny.py"
WRONG = [
    (["train"], "the following arguments are required: --config"),
    (["train", "--config=configs/none.py"], "configs/none.py: no such file or config"),
    (["train", "--config=configs/../README.md"], "configs/../README.md: expected a Python file with get_config(arg)"),
    (["train", TINY, "--config.rows.microbatch_rows=-1"], "config.rows.microbatch_rows=-1: expected a non-negative integer"),
    (["train", TINY, "--config.rows.unroll_layers=0"], "config.rows.unroll_layers=0: expected a positive integer"),
    (["train", TINY, "--config.model.embedding_dim=-1"], "config.model.embedding_dim=-1: expected a non-negative integer"),
    (["train", TINY, "--config.model.trained=(1,2)"], "config.model.trained[0]=1: expected (a text, 'full' or 'lora')"),
    (["train", TINY, "--config.data.sources=()"], "config.data.sources=(): expected at least one"),
    (["train", TINY, "--config.rows.size=(64,)"], "config.rows.size=(64,): expected () or (a positive integer"),
    (["train", TINY, "--config.init_from=none.py"], "config.init_from: none.py: no such file"),
    (["train", TINY, "--stesp=3"], "unrecognized arguments: --stesp=3"),
    (["train", TINY, "--config.stesp=3"], "--config.stesp: no such key; nearest: "),
    (
        ["train", TINY, "--config.schedule.save_minutes=1e400"],
        "config.schedule.save_minutes=inf: expected a non-negative number",
    ),
    (["train", TINY, "--config.schedule.steps=many"], "config.schedule.steps='many': expected a positive integer"),
    (["train", TINY, "--config.schedule.steps"], "write --config.schedule.steps=VALUE"),
    (["train", TINY, "--config.optimizer.algorithm=sgd"], "config.optimizer.algorithm='sgd': expected 'adamw' or 'muon'"),
    (["train", TINY, "--config.objectives.matryoshka.groups=((1,1),(32,64))"], "goes beyond the vectors"),
    (["train", TINY, "--config.objectives.matryoshka.groups=((2,4),(1,8))"], "groups not nested"),
    (["train", TINY, "--config.mesh.data=3"], "config.mesh (data=3, fsdp=1, tensor=1) does not fit"),
    (["train", TINY, "--hosts=2"], "--coordinator, --hosts and --host belong together"),
    (["train", TINY, "--coordinator=here", "--hosts=2", "--host=0"], "expected ADDRESS:PORT"),
    (["eval", TINY, "--coordinator=here:1", "--hosts=2", "--host=2", "--checkpoint=x"], "0 <= host < hosts"),
    (["eval", TINY, "--checkpoint=nowhere"], "nowhere is not a run"),
    ([], "the following arguments are required: COMMAND"),
    (["export", "--checkpoint=no/where", "--out=out", "--format=peft"], "no/where: no such directory"),
    (["export", "--checkpoint=x", "--out=out", "--format=onnx"], "invalid choice: 'onnx'"),
    (["index", "--model=x", "--input=none", "--out=out"], "none: no such file or folder"),
    (["search", "--index=none", "a"], "none is not an index: it has no manifest.json"),
    (["search", "--index=none"], "nothing to search for"),
    (["calibrate", "--index=none", "--queries=none"], "none is not an index: it has no manifest.json"),
    (["upload", "--index=none", "--to=edge:out", "--collection=a"], "none is not an index: it has no manifest.json"),
    (["plot", "none.json"], "none.json cannot be read"),
    (["prepare", "--source=cats"], "unknown source 'cats'; allowed: icons, boards"),
]


@pytest.mark.parametrize("command, message", WRONG, ids=[" ".join(command) for command, _ in WRONG])
def test_wrong_flags(tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax.distributed, "initialize", alone)  # it must come before JAX has devices, and here it has
    flags = [part.replace("configs/", f"{ROOT}/configs/") for part in command]
    monkeypatch.setattr(sys, "argv", ["metaembed", *flags])
    with pytest.raises(SystemExit) as stopped:
        cli.run()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message.replace("configs/", f"{ROOT}/configs/") in line
    assert not any(tmp_path.iterdir())


def alone(*_):
    raise ValueError("no cluster")


def test_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["metaembed", "--help"])
    with pytest.raises(SystemExit) as stopped:
        cli.run()
    page = capsys.readouterr().out
    assert stopped.value.code == 0 and all(re.search(rf"^    {command}\s", page, re.MULTILINE) for command in cli.COMMANDS)
    assert "32b, 3b, 7b, boards, " in page
    assert set(cli.COMMANDS) == {path.stem for path in Path(commands.__file__).parent.glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    page = capsys.readouterr().out
    assert stopped.value.code == 0 and page.startswith(f"usage: metaembed {command} ") and f"  metaembed {command} " in page
    assert ("--image-mib" in page) == (command in ("train", "eval", "prepare", "mine", "index", "search", "calibrate"))


@pytest.mark.parametrize("program", [["train.py"], ["eval.py"], ["-m", "metaembed_jax", "search"]])
def test_other_ways_to_the_commands(program):
    process = subprocess.run([sys.executable, *program, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0 and process.stdout.startswith(f"usage: metaembed {program[-1].removesuffix('.py')} ")


def test_a_command_without_its_packages():
    program = "import sys; sys.modules['grain'] = None; from metaembed_jax import cli; cli.run('train')"
    process = subprocess.run([sys.executable, "-c", program, TINY], capture_output=True, text=True, cwd=ROOT)
    assert (process.returncode, process.stderr) == (2, "error: metaembed train needs grain: pip install 'metaembed-jax[train]'\n")


def test_a_search_needs_nothing_of_training():
    """The commands of a server import no package of the extra `train`."""
    program = (
        "import sys, metaembed_jax.commands.search, metaembed_jax.commands.index, metaembed_jax.commands.export\n"
        "import metaembed_jax.cli, metaembed_jax.checkpoints.loading\n"
        "print([name for name in metaembed_jax.cli.TRAIN_PACKAGES if name in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert process.stdout == "[]\n"


def test_configs_of_the_package(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load_config("7b:full", {}).name == "7b_full"
    assert load_config("tiny", {}).init_from == "tiny:base"
    assert names_config("tiny:base") and names_config("a/b.py") and not names_config("tiny2") and not names_config("./tiny")
