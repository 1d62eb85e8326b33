"""`check` on two CPU devices: it passes, and names injected faults."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaembed_jax import cli
from metaembed_jax.backbones import attention_windows, attention_xla, layers
from metaembed_jax.check import kernel_cases, references, run_check
from metaembed_jax.late_interaction import margins, matryoshka, maxsim
from metaembed_jax.mesh import make_mesh
from tests.products import products, rounded, rounded_in_kernels


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    """The devices that a command sees."""
    devices = jax.devices()[:2]
    monkeypatch.setattr(run_check.jax, "devices", lambda platform=None: devices)


@pytest.fixture
def traced_afresh():
    """Trace every program again, with the fault and after it."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def test_all_float32_lines_are_right_on_a_cpu(capsys):
    cli.main(["check", "--only=f32", "--json"])
    stdout, table = capsys.readouterr()
    report = json.loads(stdout)
    assert report["ok"] and report["platform"] == "cpu" and report["devices"].startswith("2 x CPU devices")
    names = [line["name"] for line in report["lines"]]
    assert len(names) == len(set(names)) == 6 + len(kernel_cases.ATTENTION)
    for line in report["lines"]:
        assert line["status"] == "ok" and line["error"] < line["tolerance"] and line["seconds"] > 0 and line["planned_bytes"] > 0
        assert f"ok    {line['name']} " in table
    assert max(map(len, table.splitlines()[2:])) <= 100 and table.endswith("all are right\n")


def test_no_chip_rounds_a_float32_line(monkeypatch):
    """Neither forward nor backward, on a TPU in kernels, on a card in blocks of queries."""
    monkeypatch.setattr(attention_xla, "SCORE_BYTES", 2**16)
    mesh = make_mesh(devices=jax.devices()[:1])
    cases = [case for case in kernel_cases.kernel_cases(mesh, kernel_cases.CPU) if case.dtype == "float32"]
    assert len(cases) == 5 + len(kernel_cases.ATTENTION)
    for case in cases:
        with jax.set_mesh(mesh):
            traced = case.function.trace(*case.arguments())
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
            assert products(text) and not rounded(text), case.name
            assert not rounded_in_kernels(traced.jaxpr.jaxpr), case.name


def one_key_too_many(original):
    return lambda first, *sizes: original(first + 1, *sizes)


def turned_back(original):
    return lambda x, cos, sin: original(x, cos, -sin)


def in_bfloat16(original):
    return lambda equation, x, y: original(equation, x.astype(jnp.bfloat16), y.astype(jnp.bfloat16))


def of_bfloat16(original):
    return lambda self, x: original(self, x.astype(jnp.bfloat16).astype(x.dtype))


def smaller(original):
    return lambda *arguments: [(winner, 0.99 * coefficient) for winner, coefficient in original(*arguments)]


def larger(original):
    def sums(*arguments):
        values = original(*arguments)
        return values._replace(loss=1.001 * values.loss)

    return sums


FAULTS = {  # name: (owner, name of its function, replacement, lines to run, lines that are wrong)
    "mask": (attention_xla, "_visible", one_key_too_many, "causal 64", ["attention causal 64 f32", "attention causal 64 bf16"]),
    "rotation": (
        attention_windows,
        "rotate",
        turned_back,
        "windows",
        ["attention windows of 64 f32", "attention windows of 64 bf16"],
    ),
    "maxsim in bfloat16": (maxsim, "float32_einsum", in_bfloat16, "maxsim f32", ["maxsim f32", "maxsim f32 masked"]),
    "loss in bfloat16": (margins, "float32_einsum", in_bfloat16, "loss f32", ["loss f32"]),
    "linear in bfloat16": (layers.Linear, "__call__", of_bfloat16, "linear", ["linear f32"]),
    "gradient": (margins, "_block_coefficients", smaller, "loss f32", ["loss f32"]),
    "loss": (matryoshka, "_sums", larger, "loss", ["loss f32", "loss bf16"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault, monkeypatch, capsys, traced_afresh):
    owner, name, replacement, only, wrong = FAULTS[fault]
    monkeypatch.setattr(owner, name, replacement(getattr(owner, name)))
    assert check(f"--only={only}") == 1
    table = capsys.readouterr().out
    assert all(f"WRONG {line} " in table for line in wrong) and table.count("WRONG") == len(wrong)
    assert table.endswith(f"not right: {'; '.join(wrong)}\n")


def test_a_line_that_fails_does_not_end_the_command(monkeypatch, capsys, traced_afresh):
    original = maxsim._xla

    def fail_with_a_mask(query, document, mask=None, scale=None):
        if mask is not None:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand a long dump")
        return original(query, document, mask, scale)

    monkeypatch.setattr(maxsim, "_xla", fail_with_a_mask)
    assert check("--only=maxsim") == 1
    table = capsys.readouterr().out
    assert "FAIL  maxsim f32 masked" in table and "      JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory\n" in table
    assert "a long dump" not in table and table.endswith("not right: maxsim f32 masked; maxsim bf16 masked\n")
    assert all(f"ok    {line} " in table for line in ("maxsim f32", "maxsim bf16", "maxsim int8"))


def test_what_is_too_large_is_not_run(monkeypatch, capsys):
    monkeypatch.setattr("metaembed_jax.check.case.memory_limit", lambda mesh: 10_000)
    assert check("--only=encode") == 1
    assert "MemoryError: not run: it needs" in capsys.readouterr().out


def test_a_name_without_a_line_is_refused(capsys):
    with pytest.raises(run_check.UserError, match="--only=nothing: no case has this in its name"):
        cli.main(["check", "--only=nothing"])
    with pytest.raises(run_check.UserError, match="add --config=NAME"):
        cli.main(["check", "--config.schedule.steps=3"])


def test_a_config_too_large_for_a_cpu_is_refused():
    with pytest.raises(run_check.UserError, match=r"a train step takes 2e\+15 FLOPs, and a CPU gets at most 1e\+12"):
        cli.main(["check", "--config=configs/smolvlm_256m.py", "--config.rows.microbatch_rows=0"])


def check(*flags) -> int:
    """Return the exit code."""
    try:
        cli.main(["check", *flags])
    except SystemExit as error:
        return error.code
    return 0


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_reference_gradients_of_attention_are_finite_differences(softcap):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) for shape in ((1, 3, 4, 5), (1, 6, 2, 5), (1, 6, 2, 5))]
    cotangent, mask_BST = rng.normal(size=(1, 3, 4, 5)), references.visible([np.arange(3, 6)], 6, causal=True, window=4)
    _, *gradients = references.attention(*arrays, mask_BST, cotangent, 0.7, softcap)
    for number, gradient in enumerate(gradients):
        for _ in range(10):
            index, ends = tuple(rng.integers(0, size) for size in gradient.shape), []
            for sign in (1, -1):
                moved = [array.copy() for array in arrays]
                moved[number][index] += sign * 1e-6
                ends.append((references.attention(*moved, mask_BST, cotangent, 0.7, softcap)[0] * cotangent).sum())
            assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(gradient[index], rel=1e-6, abs=1e-8)
