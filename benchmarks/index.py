"""Seconds and memory of `index` around the encoder, as a folder grows and changes: `python benchmarks/index.py`. Linux only.

    python benchmarks/index.py [--files=100000] [--kind=png|pdf] [--dir=runs/index_files]

The folder holds tiny PNG files, or PDF files of one page, in nested folders; it is made once. Each step runs in a process of its
own: the first index; the same again; and again after 50 files were changed, 50 added and 50 removed. The encoder is replaced by one
that gives each document the same vectors without reading it, 64 of width 128. So the seconds are those of all else: finding,
opening and comparing the files, checking what is stored, writing, and merging. "CPU" are the seconds of the process on all cores.
"""

import argparse
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
from PIL import Image

import metaembed_jax as me
from metaembed_jax.encoding.blocks import EncodedBlock
from metaembed_jax.mesh import make_mesh

CHANGES = 50
FOLDER_FILES = 100  # in each folder
VECTORS, WIDTH = 64, 128


class NoEncoder(me.MetaEmbed):
    """A model that gives all items the same vectors, and counts them."""

    fingerprint, dimension = "0" * 16, WIDTH

    def __init__(self):
        self.config, self.mesh = types.SimpleNamespace(vectors=lambda side: VECTORS, reads_states=False), make_mesh()
        self.processor, self.count = types.SimpleNamespace(fingerprint="0" * 16), 0

    def encode_blocks(self, items, side, *, budget, size, bar, **_):
        """Yield blocks as `MetaEmbed.encode_blocks`."""
        for first in range(0, len(items), size):
            numbers = range(first, min(first + size, len(items)))
            self.count += len(numbers)
            vectors_nRD = np.zeros((len(numbers), budget, WIDTH), np.float32)
            vectors_nRD[..., 0] = 1
            bar.update(len(numbers))
            yield EncodedBlock(numbers, np.array(numbers), vectors_nRD, {})


def main() -> None:
    """Make the folder, run all steps, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000, help="files in the folder (default: 100000)")
    parser.add_argument("--kind", choices=("png", "pdf"), default="png", help="of the files (default: png)")
    parser.add_argument("--dir", type=Path, default=Path("runs/index_files"), help="where files and indexes are")
    parser.add_argument("--step", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder, out = arguments.dir / f"{arguments.kind}_{arguments.files}", arguments.dir / f"{arguments.kind}_{arguments.files}_index"
    if arguments.step:
        print(json.dumps(step(folder, out)))
        return
    make_files(folder, arguments.files, arguments.kind)
    shutil.rmtree(out, ignore_errors=True)
    print(f"{arguments.files:,} {arguments.kind} files")
    print(f"{'step':10}{'encoded':>9}{'open, s':>9}{'index, s':>9}{'all, s':>8}{'CPU, s':>8}{'peak, MiB':>11}")
    for name, prepare in (("first", None), ("same", None), ("changed", change_files), ("same", None)):
        if prepare:
            prepare(folder, arguments.kind)
        flags = [f"--files={arguments.files}", f"--kind={arguments.kind}", f"--dir={arguments.dir}", "--step"]
        done = subprocess.run([sys.executable, __file__, *flags], check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        seconds = f"{row['open']:9.1f}{row['index']:9.1f}{row['open'] + row['index']:8.1f}{row['cpu']:8.1f}"
        print(f"{name:10}{row['encoded']:9,}{seconds}{row['peak'] / 2**20:11,.0f}", flush=True)


def step(folder: Path, out: Path) -> dict:
    """Index the folder, and return the seconds, the number of encoded documents, and the peak memory in bytes."""
    model = NoEncoder()
    start, cpu = time.perf_counter(), time.process_time()
    documents = me.open_documents(folder)
    opened = time.perf_counter()
    me.index_documents(model, documents, out, progress=True)
    end = time.perf_counter()
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"encoded": model.count, "open": opened - start, "index": end - opened, "cpu": time.process_time() - cpu, "peak": peak}


def make_files(folder: Path, count: int, kind: str) -> None:
    """Write the files, unless a run before has written them all."""
    if (folder / ".complete").exists():
        return
    for number in range(count):
        write_file(folder / f"{number // FOLDER_FILES // FOLDER_FILES}" / f"{number // FOLDER_FILES}" / f"{number}.{kind}", number)
    (folder / ".complete").touch()


def write_file(path: Path, number: int) -> None:
    """Write an image or a PDF file of one page whose colour is a number."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256 % 256, number // 65536)).save(content, path.suffix[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.getvalue())


def change_files(folder: Path, kind: str) -> None:
    """Change, add and remove files."""
    files = sorted(folder.glob(f"*/*/*.{kind}"))
    chosen = np.random.default_rng(time.time_ns()).permutation(len(files))[: 2 * CHANGES]
    for number, file in enumerate(chosen.tolist()):
        if number < CHANGES:
            write_file(files[file], 2**23 + number)
        else:
            files[file].rename(files[file].with_name(f"new_{os.urandom(4).hex()}.{kind}"))


if __name__ == "__main__":
    main()
