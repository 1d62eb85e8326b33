"""Peak memory and speed of `prepare` as a source grows: `python benchmarks/prepare.py`. Linux only.

The source is Parquet files of 1,000 rows with JPEG pages of about 100 kB inside, as ColPali's train set is. Two worker processes
prepare it at several lengths. Memory is the sum over all processes of the command, read 20 times a second; memory that they share
counts once (Pss). The two longest sources give the slope, and an estimate for 100,000 rows.
"""

import argparse
import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

FILE_ROWS, DISTINCT = 1000, 50


def main() -> None:
    """Prepare each length in turn, and print its memory and speed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2500, 5000, 10000], help="lengths (default: 2500 5000 10000)")
    arguments = parser.parse_args()
    images = [jpeg(number) for number in range(DISTINCT)]
    print(f"JPEGs of {np.mean([len(image) for image in images]) / 1000:.0f} kB")
    peaks = {}
    for rows in sorted(arguments.rows):
        with tempfile.TemporaryDirectory() as scratch:
            write(Path(scratch) / "in", images, rows)
            command = [sys.executable, "-m", "metaembed_jax", "prepare", "--source=colpali", "--workers=2"]
            peaks[rows], seconds = peak([*command, f"--from={scratch}/in", f"--out={scratch}/out"])
        print(f"{rows:>7,} rows: peak {peaks[rows] / 2**20:,.0f} MiB, {rows / seconds:,.0f} rows a second", flush=True)
    if len(peaks) > 1:
        (shorter, less), (longer, more) = list(peaks.items())[-2:]
        slope = (more - less) / (longer - shorter)
        estimate = (more + slope * (100_000 - longer)) / 2**20
        print(f"slope {slope * 1000 / 2**20:+.1f} MiB for 1,000 rows; at 100,000 rows {estimate:,.0f} MiB")


def peak(command: list[str]) -> tuple[int, float]:
    """Return the peak memory of a command and its children in bytes, and its seconds."""
    start, most = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            most = max(most, sum(map(memory, with_children(process.pid))))
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return most, time.perf_counter() - start


def with_children(process: int) -> list[int]:
    """Return the ids of a process and of its descendants."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [process, *(descendant for child in children for descendant in with_children(int(child)))]


def memory(process: int) -> int:
    """Return the memory of a process in bytes, with its share of what others use too."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # the process has just ended
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def write(folder: Path, images: list[bytes], rows: int) -> None:
    """Write Parquet files with the columns that are read."""
    folder.mkdir(parents=True)
    for number, first in enumerate(range(0, rows, FILE_ROWS)):
        chosen = range(first, min(first + FILE_ROWS, rows))
        table = [{"image": {"bytes": images[n % DISTINCT], "path": None}, "query": f"which page is {n}?"} for n in chosen]
        parquet.write_table(pyarrow.Table.from_pylist(table), folder / f"train-{number:05}.parquet", row_group_size=100)


def jpeg(number: int) -> bytes:
    """Return the JPEG of a page of coarse noise."""
    pixels = np.random.default_rng(number).integers(0, 256, (48, 34, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((1240, 1754), Image.Resampling.BICUBIC).save(file, "jpeg", quality=40)
    return file.getvalue()


if __name__ == "__main__":
    main()
