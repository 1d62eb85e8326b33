"""The train step of `tiny` compiles for a TPU slice that is not there."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("libtpu")

COMPILE = """
import jax
from jax.experimental import topologies
from metaembed_jax.config import load_config
from metaembed_jax.data import sources
from metaembed_jax.data.pipeline import training_batches
from metaembed_jax.sharding import make_mesh, named_sharding, replicated
from metaembed_jax.checkpoints.loading import run_processor
from metaembed_jax.training.start import find_start
from metaembed_jax.training.step import make_trainer

config = load_config("configs/tiny.py", {"data.dir": DATA_DIR, "init_from": ""})
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
mesh = make_mesh(2, 2, 2, devices=devices)
batch = training_batches(config, run_processor(config, find_start(config).tokenizer), sources.training_records(config))[0]

def abstract(path, x):
    axes = () if path[-1].key == "order" else (None, "batch") + (None,) * (x.ndim - 2)
    sharding = named_sharding(mesh, axes) if axes else replicated(mesh)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

trainer = make_trainer(config, mesh)
compiled = trainer.step.lower(trainer.abstract, jax.tree_util.tree_map_with_path(abstract, batch)).compile()
memory = compiled.memory_analysis()
print("BYTES", memory.temp_size_in_bytes + memory.argument_size_in_bytes)
"""


def test_tiny_compiles_for_v5e(data_dir):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    code = COMPILE.replace("DATA_DIR", repr(str(data_dir)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    used = int(done.stdout.split("BYTES")[1])
    assert 1e6 < used < 16 * 2**30, "a chip of v5e has 16 GiB"
