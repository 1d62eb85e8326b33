"""The speed that a run reports."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from metaembed_jax.batch.items import Size
from metaembed_jax.batch.training import StepShape
from metaembed_jax.config import load_config
from metaembed_jax.flops import train_flops
from metaembed_jax.training.speed import Speed, shown

SHAPE = StepShape(Size(140, 36, 80), 2, 8)
SPENT = {"seconds/input": 1.0, "seconds/compile": 50.0, "seconds/step": 3.0, "seconds/validation": 4.0, "seconds/checkpoint": 2.0}


def mesh(kind):
    return SimpleNamespace(devices=np.array([SimpleNamespace(device_kind=kind)] * 4).reshape(2, 2))


def test_rates_and_the_time_left():
    config = load_config("tests/training/small.py", {"schedule.steps": "100"})
    speed = Speed(config, SHAPE, mesh("TPU v5 lite"), 10)
    rates = speed.read(20, SPENT)
    flops = train_flops(config, SHAPE).model * 10 / 4
    assert rates == {
        "samples_per_second": 16 * 10 / 4,
        "flops_per_second": flops,
        "mfu": pytest.approx(flops / (4 * 197e12)),
        "seconds_left": 80,  # ten steps took ten seconds, without the compilation
    }
    assert shown(rates) == {"pairs/s": 40, "FLOP/s": flops, "MFU": rates["mfu"]}
    steps_only = SPENT | {"seconds/compile": 0.0, "seconds/validation": 0.0, "seconds/checkpoint": 0.0}
    assert speed.read(40, steps_only)["samples_per_second"] == 80
    assert speed.read(41, steps_only)["seconds_left"] == pytest.approx(59 * 18 / 31)


def test_without_a_known_peak_there_is_no_mfu():
    config = load_config("tests/training/small.py")
    assert "mfu" not in Speed(config, SHAPE, mesh(jax.devices()[0].device_kind), 0).read(1, SPENT)
