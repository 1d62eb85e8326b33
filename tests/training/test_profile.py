"""The time of a run by activity, and its traces."""

import subprocess
import sys
import time

from metaembed_jax.training.profile import Stopwatch, Trace


def test_seconds_add_up():
    began = time.monotonic()
    watch = Stopwatch()
    with watch.spending("input"):
        time.sleep(0.05)
    with watch.spending("checkpoint"):
        time.sleep(0.02)
    time.sleep(0.03)
    spent = watch.read()
    assert sum(spent.values()) <= time.monotonic() - began
    assert spent["seconds/input"] >= 0.05 and spent["seconds/checkpoint"] >= 0.02 and spent["seconds/step"] >= 0.03
    assert spent["seconds/validation"] == 0 and watch.read()["seconds/input"] == 0


# In a process of its own: JAX's profiler would look for a TPU wherever other tests have loaded libtpu to compile, and crash.
TRACE_TWO = """
import pathlib, sys
from metaembed_jax.training.profile import Trace
trace, waited = Trace((2, 3), pathlib.Path(sys.argv[1])), []
for step in range(1, 6):
    trace.before(step)
    trace.after(step, lambda step=step: waited.append(step))
trace.close()
print(waited)
"""


def test_some_steps_are_traced(tmp_path):
    process = subprocess.run([sys.executable, "-c", TRACE_TWO, str(tmp_path)], capture_output=True, text=True)
    assert process.stdout == "[3]\n", process.stderr
    assert list(tmp_path.glob("trace/plugins/profile/*/*.xplane.pb"))


def test_no_steps_are_traced(tmp_path):
    trace = Trace((), tmp_path)
    trace.before(1)
    trace.after(1, lambda: None)
    trace.close()
    assert not list(tmp_path.iterdir())
