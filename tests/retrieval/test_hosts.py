"""Search of an index by several hosts, each with its own devices."""

import numpy as np

import metaembed_jax as me
from tests.retrieval.reference import unit
from tests.several_hosts import Hosts


def test_any_number_of_hosts_finds_the_same_bits(tmp_path):
    rng = np.random.default_rng(0)
    document = unit(rng, 1333, 9, 16)
    document[1200] = document[3]
    me.Index.build([vectors_RD[: 1 + n % 9] for n, vectors_RD in enumerate(document)], dtype="int8", path=tmp_path / "index")
    np.save(tmp_path / "queries.npy", unit(rng, 5, 4, 16))
    for count in (1, 2):
        command = ["-m", "tests.retrieval.hosts_program", f"--index={tmp_path / 'index'}", f"--queries={tmp_path / 'queries.npy'}"]
        with Hosts(count, [*command, f"--out={tmp_path / str(count)}"]) as hosts:
            hosts.wait()
    for number in (0, 1):
        alone, *together = (np.load(tmp_path / f"{name}-{number}-{host}.npz") for name, host in ((1, 0), (2, 0), (2, 1)))
        assert len({*alone["ids"].ravel()}) > 20
        for results in together:
            for key in ("scores", "ids"):
                np.testing.assert_array_equal(results[key], alone[key])
