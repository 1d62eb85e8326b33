"""One host of `test_hosts`: ten steps of `tiny`; writes its losses, and its part of every batch.

The devices of hosts alternate in the mesh, as they may in a TPU slice.
"""

import argparse
import dataclasses

import jax
import numpy as np

from metaembed_jax.batch.training import put
from metaembed_jax.config import load_config
from metaembed_jax.data.pipeline import training_batches
from metaembed_jax.hosts.connect import connect_hosts
from metaembed_jax.mesh import make_mesh
from metaembed_jax.network_config import model_config
from metaembed_jax.sharding import batch_shards, rows_here
from metaembed_jax.startup import add_host_flags
from metaembed_jax.training.step import make_trainer
from tests.training.batches import make_plan

parser = argparse.ArgumentParser()
parser.add_argument("--data")
parser.add_argument("--out")
add_host_flags(parser)
flags = parser.parse_args()
connect_hosts(flags.coordinator, flags.hosts, flags.host)
config = load_config("configs/tiny.py", {"data.dir": flags.data, "init_from": "", "schedule.steps": "61"})
mesh = make_mesh(devices=np.array(jax.devices()).reshape(2, 4).T.ravel().tolist())
items, plan = make_plan(config)
shape = plan.shape(config.rows.microbatch_rows, batch_shards(mesh))
rows = rows_here(mesh, shape.size)
dataset = training_batches(items, shape, model_config(config).architecture.layout, rows)
trainer = make_trainer(config, mesh)
state, arrays = trainer.init(), {"losses": [], "rows": rows}
for step in range(10):
    batch = dataset[step]
    parts = dataclasses.asdict(batch.rows) | {"queries": batch.queries, "documents": batch.documents}
    arrays |= {f"{step}/{name}": x for name, x in parts.items() if name != "patch_arrays"}
    state, figures = trainer.step(state, put(batch, mesh))
    arrays["losses"].append(float(figures["loss"]))
np.savez(f"{flags.out}/{flags.host or 0}.npz", **arrays)
