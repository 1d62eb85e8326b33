"""Indexing and search by several hosts, each with its own devices."""

import re

import numpy as np

import metaembed_jax as me
from tests.retrieval.following_files import check, save, spoil
from tests.retrieval.reference import unit
from tests.several_hosts import Hosts


def test_any_number_of_hosts_finds_the_same_bits(tmp_path):
    rng = np.random.default_rng(0)
    document = unit(rng, 1333, 9, 16)
    document[1200] = document[3]
    me.Index.build(
        [vectors_RD[: 1 + n % 9] for n, vectors_RD in enumerate(document)], dtype="int8", exact="float32", path=tmp_path / "index"
    )
    np.save(tmp_path / "queries.npy", unit(rng, 5, 4, 16))
    for count in (1, 2):
        command = ["-m", "tests.retrieval.hosts_program", f"--index={tmp_path / 'index'}", f"--queries={tmp_path / 'queries.npy'}"]
        with Hosts(count, [*command, f"--out={tmp_path / str(count)}"]) as hosts:
            hosts.wait()
    for number in range(4):
        alone, *together = (np.load(tmp_path / f"{name}-{number}-{host}.npz") for name, host in ((1, 0), (2, 0), (2, 1)))
        assert len({*alone["ids"].ravel()}) > 20
        for results in together:
            for key in ("scores", "ids"):
                np.testing.assert_array_equal(results[key], alone[key])


def test_hosts_write_one_index(tmp_path):
    folder, index = tmp_path / "in", tmp_path / "index"
    for number in range(41):
        save(folder / f"{number}.png", (number, 0, 0))
    spoil(folder / "2.png")
    (folder / "a.pdf").write_bytes(b"")

    def run(*jobs):
        """Return what each of two hosts prints, and the items that it encodes in each job."""
        command = ["-m", "tests.retrieval.index_program", f"--input={folder}"]
        with Hosts(2, command, lambda host: ["--jobs", *(job.format(host=host) for job in jobs)]) as hosts:
            outputs = [output for output, _ in hosts.wait()]
        return outputs, np.array([[*map(int, re.findall("encoded ([0-9]+)", output))] for output in outputs])

    (first, second), encoded = run(
        f"1={index}", f"2={index}", f"2={index}", f"2={tmp_path}/of host {{host}}", f"{{host}}={tmp_path}/none"
    )
    assert encoded.sum(0).tolist() == [7, 33, 0, 0, 0] and encoded[:, 1].min() > 10
    assert "a.pdf is not a readable PDF file" in first and "2 documents so far cannot be read; --skip=2" in second
    assert "40 items (33 encoded, 7 kept, 0 dropped, 2 left out)" in first and "left out" not in second
    assert "host 1 does not see the files of the first host; expected a folder that all hosts share" in second
    assert "the model, budget, types or skip of host 1: expected those of the first host" in second
    assert not (tmp_path / "none").exists()
    built = me.Index.load(index)
    check(built, me.open_documents(folder, skip=1))
    assert len(built._segments) == 2
    (folder / "5.png").unlink()
    for name in ("6", "new"):
        save(folder / f"{name}.png", "red")
    assert run(f"2={index}")[1].sum() == 2
    check(me.Index.load(index), me.open_documents(folder, skip=1))
