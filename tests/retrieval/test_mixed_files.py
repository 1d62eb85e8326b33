"""An index of thousands of mixed files whose command is killed again and again, and then follows its folder."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

import metaembed_jax as me
from tests.checkpoints.huggingface_files import random_tensors, write
from tests.retrieval.following_files import stored_vectors
from tests.retrieval.mixed_files import change_files, whole_images, write_mixed_files

ROOT = Path(__file__).parents[2]
FILES, ROWS, KILLS, CHANGES = 5000, 1500, 20, 50


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write(tmp_path_factory.mktemp("huggingface"), random_tensors())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet"])
def test_killed_at_random_moments_and_changed(kind, model, tmp_path):
    broken = broken_files = write_mixed_files(tmp_path / "files", FILES if kind == "folder" else ROWS)
    documents = tmp_path / "files" if kind == "folder" else tmp_path / "files" / f"table.{kind}"
    if kind != "folder":
        broken = write_table(documents, range(ROWS), broken_files)
    skip = 4 * len(broken)

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "metaembed_jax", "index", f"--model={model}", f"--input={documents}", "--cpu"]
        command += [f"--out={tmp_path / name}", f"--skip={skip}", "--budget=8"]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(name: str) -> str:
        process = start(name)
        output, _ = process.communicate()
        assert process.returncode == 0, output[-2000:]
        return output

    finish("warm")  # fills the cache of compiled programs
    shutil.rmtree(tmp_path / "warm")
    began = time.monotonic()
    whole = finish("whole")
    duration = time.monotonic() - began

    kills = 0
    for moment in np.random.default_rng(0).uniform(0, duration / 2, KILLS):
        process = start("killed")
        try:
            process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    last = finish("killed")
    print(f"{kind}: {kills} of {KILLS} killed in {duration:.0f} s\n{whole[-300:]}\n{last[-300:]}")

    assert kills >= KILLS // 4
    expected, vectors = stored_vectors(me.Index.load(tmp_path / "whole")), stored_vectors(me.Index.load(tmp_path / "killed"))
    assert vectors.keys() == expected.keys() and len(expected) > (FILES if kind == "folder" else ROWS) / 2
    for item in expected:
        np.testing.assert_array_equal(vectors[item], expected[item], err_msg=item)
    left_out = dict(me.Index.load(tmp_path / "whole").left_out)
    assert dict(me.Index.load(tmp_path / "killed").left_out) == left_out
    files = {item.partition("#")[0] for item in left_out}
    assert files <= broken and {item for item in broken if not item.endswith(("pdf", "tif"))} <= files and files
    assert all(item in last for item in left_out)

    encoded, dropped = 2 * CHANGES, CHANGES
    if kind == "folder":
        change_files(tmp_path / "files", CHANGES)
    else:
        bad = write_table(documents, range(CHANGES, ROWS + CHANGES), broken_files, changed=CHANGES)
        encoded -= len(bad & {*map(str, range(CHANGES, 2 * CHANGES)), *map(str, range(ROWS, ROWS + CHANGES))})
        dropped -= len(broken & {*map(str, range(CHANGES))})
    output = finish("killed")
    assert re.search(rf"\({encoded} encoded, [0-9,]+ kept, {dropped} dropped", output), output[-500:]
    finish("new")
    expected, vectors = stored_vectors(me.Index.load(tmp_path / "new")), stored_vectors(me.Index.load(tmp_path / "killed"))
    assert vectors.keys() == expected.keys()
    for item in expected:
        np.testing.assert_allclose(vectors[item], expected[item], atol=2e-2, err_msg=item)


def write_table(file: Path, numbers: range, broken: set[str], changed: int = 0) -> set[str]:
    """Write a row of text, image, or both for each number, and return the ids of the rows with broken images.

    Args:
      broken: paths of broken images, which are used as whole ones.
      changed: how many of the first rows have another text than before.
    """
    images = sorted(
        {str(image.relative_to(file.parent)) for image in whole_images(file.parent)}
        | {name for name in broken if name.endswith(("png", "jpg", "webp", "bmp"))}
    )
    rows, bad = [], set()
    for number in numbers:
        row = {
            "id": str(number),
            "text": f"row {number}{' changed' * (number - numbers.start < changed)}",
            "image": None,
            "further": number,
        }
        if number % 3:
            name = images[number % len(images)]
            inline = {"bytes": (file.parent / name).read_bytes(), "path": None}
            row["image"] = name if file.suffix == ".jsonl" else inline if number % 2 else {"bytes": None, "path": name}
            bad |= {row["id"]} if name in broken else set()
        rows.append(row)
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=100)
    return bad
