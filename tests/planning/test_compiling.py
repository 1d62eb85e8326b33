"""The memory of a compiler that is stopped early is that of the whole compiler."""

from pathlib import Path

import jax
import pytest

pytest.importorskip("libtpu")

from metaembed_jax.config import load_config
from metaembed_jax.planning import compiling
from metaembed_jax.planning.compiling import buffer_bytes, compile_program
from metaembed_jax.planning.programs import train_program
from metaembed_jax.planning.topology import topology
from metaembed_jax.training.step import run_mesh

SMALL = str(Path(__file__).parents[1] / "training" / "small.py")


def test_memory_is_that_of_the_whole_compiler():
    name = "v6e:1x1"
    config = load_config(SMALL, {"optimizer.algorithm": "adamw"})
    mesh = run_mesh(config, topology(name).devices)
    with jax.set_mesh(mesh):
        whole = train_program(config, mesh).trace().lower().compile().memory_analysis()
    compiled = compile_program(train_program, config, name)
    assert not compiled.error and compiled.text.startswith("HloModule")
    assert compiled.arguments == whole.argument_size_in_bytes
    temporaries = whole.temp_size_in_bytes + whole.output_size_in_bytes - whole.alias_size_in_bytes
    assert 0 <= temporaries - compiled.temporaries < 64 * 2**10  # of the machine code itself


def test_buffers_elsewhere_do_not_count():
    lines = [
        "allocation 0: size 4096, page 0, parameter 3, shape |f32[8,128]| at ShapeIndex {}, maybe-live-out:",
        " value: <1 x @0> (size=4096,offset=0): f32[8,128]",
        "allocation 1: size 512, color 1, page 0, parameter 4, shape |f32[128]| at ShapeIndex {}:",
        "allocation 2: size 1000, page 0, maybe-live-out:",
        "allocation 3: size 300, page 0, preallocated-temp:",
        "allocation 4: size 70, color 1, page 0, preallocated-temp:",
        "allocation 5: size 9, page 0, thread-local:",
        "allocation 6: size 8, page 0, constant:",
    ]
    assert buffer_bytes("\n".join(lines)) == (4096, 1300)


def test_a_compiler_that_dies_is_no_plan(monkeypatch):
    monkeypatch.setattr(compiling, "_compile", exit)
    assert "process died" in compile_program(train_program, load_config(SMALL), "v5e:2x2").error


def bad_program(config, mesh):
    raise ValueError("no such layer")


def test_an_error_before_the_compiler_is_named():
    assert compile_program(bad_program, load_config(SMALL), "v5e:2x2").error == "ValueError: no such layer"
