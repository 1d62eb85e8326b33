"""The cache of compiled programs."""

import os
import subprocess
import sys

import pytest

from tests.several_hosts import ROOT

PROGRAM = """
import sys
import jax, jax.numpy as jnp
from metaembed_jax import compilation
print(compilation.keep_programs())
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
for size in range(3, 6):
    with compilation.announced("a product"):
        jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((size, size))).block_until_ready()
print(sum(event.endswith("cache_hits") for event in events), sum(event.endswith("cache_misses") for event in events))
"""


def run(home, program=PROGRAM, **variables):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    environment |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(home), **variables}
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines(), process.stderr


def test_the_next_process_compiles_nothing(tmp_path):
    folder = tmp_path / "metaembed_jax" / "programs"
    (first, counted), _ = run(tmp_path)
    assert first == str(folder) and counted.startswith("0 ")
    (_, counted), _ = run(tmp_path)
    assert counted.endswith(" 0") and not counted.startswith("0 ")
    # A process that is killed as it writes leaves a program without the time of its last use.
    program = next(folder.glob("jit__lambda*-cache"))
    program.write_bytes(program.read_bytes()[:100])
    program.with_name(program.name.removesuffix("-cache") + "-atime").unlink()
    (_, counted), errors = run(tmp_path)
    assert counted.endswith(" 1") and not errors
    (_, counted), _ = run(tmp_path)
    assert counted.endswith(" 0")


def test_the_least_recently_used_programs_are_removed(tmp_path, monkeypatch):
    from metaembed_jax import compilation

    monkeypatch.setattr(compilation, "MAX_PROGRAMS", 2)
    for age, key in enumerate("abc"):
        (tmp_path / f"{key}-cache").touch()
        (tmp_path / f"{key}-atime").touch()
        os.utime(tmp_path / f"{key}-atime", (1000 - age, 1000 - age))
    compilation._prune(tmp_path)
    assert {file.name for file in tmp_path.glob("?-*")} == {"a-cache", "a-atime", "b-cache", "b-atime"}


def test_a_folder_that_is_not_writable_costs_one_line(tmp_path):
    (tmp_path / "metaembed_jax").touch()
    (folder, _), errors = run(tmp_path)
    assert folder == "None"
    assert (
        errors
        == f"compiled programs are not kept ({tmp_path}/metaembed_jax/programs: Not a directory); the next run compiles again\n"
    )


def test_a_disk_that_fills_up_costs_one_line(tmp_path):
    """A limit of 100 bytes a file stands in for a full disk."""
    full = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + PROGRAM.replace(
        "events = []", "events = []; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))"
    )
    _, errors = run(tmp_path, full)
    assert errors.count("\n") == 1 and errors.startswith("compiled programs are not kept (OSError: ") and "File too large" in errors


@pytest.mark.parametrize("variables", [{"JAX_COMPILATION_CACHE_DIR": "elsewhere"}, {"JAX_ENABLE_COMPILATION_CACHE": "false"}])
def test_variables_of_jax_stand(tmp_path, variables):
    variables = {key: str(tmp_path / value) if "DIR" in key else value for key, value in variables.items()}
    (folder, _), _ = run(tmp_path, **variables)
    assert folder == "None" and not (tmp_path / "metaembed_jax").exists()


def test_a_long_compilation_is_announced():
    program = "import time\nfrom metaembed_jax import compilation\ncompilation.ANNOUNCE_SECONDS = 0.1\n"
    program += "with compilation.announced('the encoder'): time.sleep(1)"
    _, errors = run("/nowhere", program)
    assert errors.startswith(
        "compiling the encoder: seconds for a small model, minutes for a large one; the next run compiles it again"
    )
