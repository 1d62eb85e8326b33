"""One host of `test_hosts`: ten steps of `tiny`; writes its losses, and its part of every batch.

The devices of hosts alternate in the mesh, as they may in a TPU slice.
"""

import argparse

import jax
import numpy as np

from metaembed_jax import hosts
from metaembed_jax.checkpoints.loading import run_processor
from metaembed_jax.config import load_config, model_config
from metaembed_jax.data import sources
from metaembed_jax.data.pipeline import training_batches
from metaembed_jax.sharding import make_mesh, rows_here
from metaembed_jax.startup import add_host_flags
from metaembed_jax.training.start import find_start
from metaembed_jax.training.step import make_trainer, put_batch

parser = argparse.ArgumentParser()
parser.add_argument("--data")
parser.add_argument("--out")
add_host_flags(parser)
flags = parser.parse_args()
hosts.connect(flags.coordinator, flags.hosts, flags.host)
config = load_config("configs/tiny.py", {"data.dir": flags.data, "init_from": ""})
mesh = make_mesh(devices=np.array(jax.devices()).reshape(2, 4).T.ravel().tolist())
architecture, processor = model_config(config).architecture, run_processor(config, find_start(config).tokenizer)
rows = rows_here(mesh, config.microbatch_size)
dataset = training_batches(config, architecture, processor, sources.training_records(config), rows)
trainer = make_trainer(config, mesh)
state, found = trainer.init(), {"losses": [], "rows": rows}
for step in range(10):
    batch = dataset[step]
    for side in ("query", "candidate"):
        part = batch[side]
        found |= {f"{step}/{side}/{key}": x for key, x in part["groups"][0].items()} | {f"{step}/{side}/order": part["order"]}
    state, figures = trainer.step(state, put_batch(batch, mesh))
    found["losses"].append(float(figures["loss"]))
np.savez(f"{flags.out}/{flags.host or 0}.npz", **found)
