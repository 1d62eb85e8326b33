"""`check` on two CPU devices: it passes, and faults that are put in are found by name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaembed_jax import cli
from metaembed_jax.backbones import attention, layers
from metaembed_jax.check import command
from metaembed_jax.check.references import attention as reference
from metaembed_jax.late_interaction import matryoshka, maxsim
from metaembed_jax.training import step


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    """The devices that a command sees."""
    devices = jax.devices()[:2]
    monkeypatch.setattr(command.jax, "devices", lambda platform=None: devices)


@pytest.fixture
def traced_anew():
    """Let nothing that was traced without a fault, or with one, serve again."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def test_all_is_right_on_a_cpu(capsys):
    cli.main(["check", "--json"])
    stdout, table = capsys.readouterr()
    report = json.loads(stdout)
    assert report["ok"] and report["platform"] == "cpu" and report["devices"].startswith("2 x CPU devices")
    names = [line["name"] for line in report["lines"]]
    assert len(names) == len(set(names)) == 34
    for line in report["lines"]:
        assert line["status"] == "ok" and line["error"] < line["tolerance"] and line["seconds"] > 0 and line["planned_bytes"] > 0
    for name in names:
        assert f"ok    {name} " in table
    assert max(map(len, table.splitlines()[2:])) <= 100 and "all are right" in table


def seen_one_too_many(original):
    def tril(mask, k=0):
        return original(mask, k=k + 1)

    return tril


def rounded(original):
    def product(equation, x, y):
        return original(equation, x.astype(jnp.bfloat16), y.astype(jnp.bfloat16))

    return product


def rounded_input(original):
    def call(self, x):
        return original(self, x.astype(jnp.bfloat16).astype(x.dtype))

    return call


def smaller_gradient(original):
    def coefficients(gradient, winners):
        return [(winner, 0.99 * coefficient) for winner, coefficient in original(gradient, winners)]

    return coefficients


def larger(original):
    def sums(*arguments):
        losses, hits = original(*arguments)
        return 1.001 * losses, hits

    return sums


FAULTS = {  # what is replaced, by what, lines to run, which of them are wrong
    "mask": (attention.jnp, "tril", seen_one_too_many, "causal 64 f32", ["attention causal 64 f32"]),
    "maxsim in bfloat16": (maxsim, "product", rounded, "maxsim f32", ["maxsim f32", "maxsim f32 masked"]),
    "loss in bfloat16": (matryoshka, "product", rounded, "loss f32", ["loss f32"]),
    "linear in bfloat16": (layers.Linear, "__call__", rounded_input, "linear", ["linear f32"]),
    "gradient": (matryoshka, "_block_coefficients", smaller_gradient, "loss f32", ["loss f32"]),
    "loss": (matryoshka, "_sums", larger, "loss", ["loss f32", "loss bf16"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault, monkeypatch, capsys, traced_anew):
    place, name, replacement, only, wrong = FAULTS[fault]
    monkeypatch.setattr(place, name, replacement(getattr(place, name)))
    with pytest.raises(SystemExit) as error:
        cli.main(["check", f"--only={only}"])
    assert error.value.code == 1
    table = capsys.readouterr().out
    assert [line for line in wrong if f"WRONG {line} " in table] == wrong
    assert table.count("WRONG ") == len(wrong) and f"not right: {'; '.join(wrong)}\n" in table
