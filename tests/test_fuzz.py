"""The command that fuzzes everything that reads files, and what it makes of readers that are wrong."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMAND = ROOT / "benchmarks" / "fuzz.py"
WRONG = """
import os, random, signal, warnings

from metaembed_jax.errors import UserError

def generator(seed, kind, number):
    return random.Random(number)

def prepare(kind):
    return (lambda random, folder: (folder / "x").write_bytes(b"content") and random.random()), CHECKS[kind]

def wrong(_, content):
    assert content > 2, "other pixels"

def crash(_, content):
    os.kill(os.getpid(), signal.SIGSEGV)

def hang(_, content):
    while True:
        pass

def large(_, content):
    return str(len(b"x" * (400 << 20)))

def loud(_, content):
    warnings.warn(f"metadata {content}")

def right(_, content):
    raise UserError("x: is broken") if content < 0.5 else None

def lines(_, content):
    raise UserError("x:\\nis broken")

CHECKS = {"image": wrong, "tiff": crash, "pdf": hang, "table": large, "tensors": loud, "config": lines, "index": lambda *_: None}
"""


def fuzz(command, *flags, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, command, f"--save={folder / 'saved'}", *flags], capture_output=True, text=True, env=environment
    )
    return process.returncode, process.stdout


def test_inputs_of_each_kind(tmp_path):
    code, output = fuzz(COMMAND, "--inputs=100", "--seed=23", "--workers=1", folder=tmp_path)
    assert code == 0, output
    rows = dict(line.split(maxsplit=1) for line in output.splitlines()[1:-1])
    assert rows.keys() == {"image", "tiff", "pdf", "table", "tensors", "config", "index", "all"}
    inputs, accepted, refused, faults, _ = map(int, rows["all"].split())
    assert inputs == 100 and accepted > 15 and refused > 15 and not faults


@pytest.mark.slow
def test_many_inputs(tmp_path):
    code, output = fuzz(COMMAND, "--inputs=3000", "--seed=24", folder=tmp_path)
    assert code == 0, output


def test_each_fault_is_found_and_its_input_saved(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    copied = tmp_path / "benchmarks" / "fuzz.py"
    copied.write_text(COMMAND.read_text().replace("CPU_SECONDS = 20", "CPU_SECONDS = 1"))
    copied.with_name("fuzz_kinds.py").write_text("raise SystemExit(3)")
    code, output = fuzz(copied, "--inputs=14", "--workers=1", folder=tmp_path)
    assert code == 1 and "the process ended with" in output
    shutil.copy(COMMAND.with_name("memory.py"), copied.parent)
    copied.with_name("fuzz_kinds.py").write_text(WRONG)
    code, output = fuzz(copied, "--inputs=14", "--workers=1", folder=tmp_path)
    lines = [line for line in output.splitlines() if line.startswith("--seed=0 --only")]
    expected = ["AssertionError: other pixels"] * 5
    expected += ["the process ended with -11", "over 1 s of CPU", "memory grew by ", "memory grew by "]
    expected += ["printed ", "an error of several lines"]
    assert code == 1 and len(lines) == len(expected), output
    for line, text in zip(lines, expected, strict=True):
        assert text in line, line
    for line in lines:
        kind, number = line.split()[1].removeprefix("--only=").split(":")
        assert (tmp_path / "saved" / f"{kind}-0-{number}" / "x").read_bytes() == b"content"
    code, output = fuzz(copied, "--only=image:3", folder=tmp_path)
    assert code == 1 and "--only=image:3  AssertionError" in output
    assert fuzz(copied, "--only=index:3", folder=tmp_path)[0] == 0
