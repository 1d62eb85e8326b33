"""What a run says of its own time."""

import time

from metaembed_jax.training.profile import Stopwatch, Trace


def test_seconds_add_up():
    watch = Stopwatch()
    began = time.monotonic()
    with watch.spending("input"):
        time.sleep(0.05)
    with watch.spending("checkpoint"):
        time.sleep(0.02)
    time.sleep(0.03)
    spent = watch.read()
    assert sum(spent.values()) <= time.monotonic() - began
    assert spent["seconds/input"] >= 0.05 and spent["seconds/checkpoint"] >= 0.02 and spent["seconds/step"] >= 0.03
    assert spent["seconds/validation"] == 0 and watch.read()["seconds/input"] == 0


def test_some_steps_are_traced(tmp_path):
    trace, waited = Trace((2, 3), tmp_path), []
    for step in range(1, 6):
        trace.before(step)
        trace.after(step, lambda step=step: waited.append(step))
    trace.close()
    assert waited == [3] and list(tmp_path.glob("trace/plugins/profile/*/*.xplane.pb"))


def test_no_steps_are_traced(tmp_path):
    trace = Trace((), tmp_path)
    trace.before(1)
    trace.after(1, lambda: None)
    trace.close()
    assert not list(tmp_path.iterdir())
