"""The command `index` on two hosts: its vectors, its memory, and what it does when a host dies."""

import json
import re
import time

import numpy as np
import pytest
from PIL import Image

import metaembed_jax as me
from tests.checkpoints.huggingface_files import random_tensors, write
from tests.retrieval.following_files import stored_vectors
from tests.several_hosts import Hosts

FILES, PART = 2000, 64 * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, all files, and the half of them."""
    folder, rng = tmp_path_factory.mktemp("hosts"), np.random.default_rng(0)
    write(folder / "model", random_tensors())
    for name in ("all", "half"):
        (folder / name).mkdir()
    for number in range(FILES):
        height, width = rng.integers(28, 120, 2)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        for name in ("all", "half")[: 1 + number % 2]:
            image.save(folder / name / f"{number}.png")
    return folder


def command(folder, out, files="all"):
    flags = f"--model={folder / 'model'}", f"--input={folder / files}", f"--out={folder / out}", "--dtype=float32"
    return ["-m", "tests.retrieval.index_command", *flags, "--cpu", "--no-compile-cache"]


def added_memory(outputs):
    """Return by how much the memory of each host grew after its model was loaded, in KiB."""
    peaks = [re.findall("memory ([0-9]+) ([0-9]+)", errors)[-1] for _, errors in outputs]
    return [int(peak) - int(resident) for peak, resident in peaks]


def assert_same_bits(index, other):
    stored, expected = stored_vectors(me.Index.load(index)), stored_vectors(me.Index.load(other))
    assert stored.keys() == expected.keys() and len(stored) == FILES
    for item, vectors_RD in expected.items():
        np.testing.assert_array_equal(stored[item], vectors_RD)


@pytest.mark.slow
def test_two_hosts_index_what_one_does(folder):
    with Hosts(1, command(folder, "one")) as hosts:
        hosts.wait()
    with Hosts(1, command(folder, "half of all", "half"), devices=4) as hosts:
        (share,) = added_memory(hosts.wait())
    with Hosts(2, command(folder, "two")) as hosts:
        outputs = hosts.wait()
    assert f"{FILES:,} items ({FILES:,} encoded, 0 kept, 0 dropped)" in outputs[0][0] and not outputs[1][0]
    assert_same_bits(folder / "two", folder / "one")
    print(f"KiB above the model: {added_memory(outputs)} of two hosts, {share} for a share alone")
    assert max(added_memory(outputs)) < 1.2 * share
    _check_killed(folder)


def _check_killed(folder):
    """Kill the second host after a part; the first ends with a line, and the same command continues."""
    draft = folder / "killed" / "draft.json"
    with Hosts(2, command(folder, "killed")) as hosts:
        while not draft.exists():
            assert hosts.processes[0].poll() is None
            time.sleep(0.05)
        hosts.processes[1].kill()
        _, errors = hosts.processes[0].communicate(timeout=60)
        assert hosts.processes[0].returncode == 2 and "Traceback" not in errors
        assert (
            "error: another host has died or cannot be reached" in errors and "start the same command on all hosts again" in errors
        )
    kept = sum(segment["items"] for segment in json.loads(draft.read_text())["index"]["segments"])
    assert PART <= kept < FILES
    with Hosts(2, command(folder, "killed")) as hosts:
        (output, _), _ = hosts.wait()
    assert f"({FILES - kept:,} encoded, {kept:,} kept, 0 dropped)" in output
    assert_same_bits(folder / "killed", folder / "one")
