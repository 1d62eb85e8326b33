"""One host of `test_hosts`, which searches an index together with the others."""

import argparse

import numpy as np

import metaembed_jax as me
from metaembed_jax.hosts.connect import connect_hosts
from metaembed_jax.startup import add_host_flags

parser = argparse.ArgumentParser()
parser.add_argument("--index")
parser.add_argument("--queries")
parser.add_argument("--out")
add_host_flags(parser)
flags = parser.parse_args()
connect_hosts(flags.coordinator, flags.hosts, flags.host)
index, queries = me.Index.load(flags.index), np.load(flags.queries)
index.calibrate(queries, (1, 1), (4, 9), coverage=0.5, confidence=0.5)
for number, budget in enumerate(((3, 7), [(1, 1, 50), (4, 9)], (4, 9), "auto")):
    scores, ids = index.search(queries, 10, budget, certified=number == 2)
    np.savez(f"{flags.out}-{number}-{flags.host or 0}", scores=scores, ids=ids.astype(str))
