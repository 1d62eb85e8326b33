"""One host of `test_hosts`, which lets indexes follow a folder together with the others, and prints how many items it encodes."""

import argparse

import metaembed_jax as me
from metaembed_jax.hosts.connect import connect_hosts
from metaembed_jax.mesh import make_mesh
from metaembed_jax.retrieval import parts, store
from metaembed_jax.startup import add_host_flags
from tests.retrieval.fake_model import FakeModel

parser = argparse.ArgumentParser()
parser.add_argument("--input")
parser.add_argument("--jobs", nargs="+", help="SKIP=OUT of each index")
add_host_flags(parser)
flags = parser.parse_args()
connect_hosts(flags.coordinator, flags.hosts, flags.host)
parts.PART_DOCUMENTS = 1  # of each of eight devices
parts.SIMILAR_PARTS, store.SHARED_SECONDS = 2, 0.1
model = FakeModel(mesh=make_mesh())
for skip, _, out in (job.partition("=") for job in flags.jobs):
    try:
        me.index_documents(model, me.open_documents(flags.input, skip=9), out, dtype="float32", skip=int(skip), progress=True)
    except me.UserError as error:
        print(f"error: {error}")
    print(f"encoded {model.count()}")
