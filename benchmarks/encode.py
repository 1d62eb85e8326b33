"""Measure the encoder on photos of very different sizes: `python benchmarks/encode.py`.

1. Patches sent to the devices for each patch that a photo needs, and the number of programs, on 1, 8 and 64 devices. The schedule
   is a function of sizes, so nothing is encoded. 1,000 photos.
2. Threads against processes: photos a second, from JPEG bytes to arrays.
3. Overlap of decoding and computing. With an accelerator, which a sleeping thread stands for, the host's cores are free to decode:
   the time of a stream is compared with the slower of decoding and computing alone. Without one, both share the host's cores: the
   time of a stream is compared with the core-seconds of decoding and computing, divided by the cores.
"""

import argparse
import io
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from metaembed_jax.backbones.family import family
from metaembed_jax.batch.items import Limits
from metaembed_jax.batch.rows import Batch
from metaembed_jax.config import load_config
from metaembed_jax.data import tokenizer
from metaembed_jax.encoding.encoder import CHUNK_ITEMS, Encoder
from metaembed_jax.encoding.reading import MOST_THREADS
from metaembed_jax.encoding.schedule import Schedule
from metaembed_jax.mesh import make_mesh
from metaembed_jax.network_config import model_config

PHOTOS, SEED, ROUNDS = 1000, 0, 3
BOUNDS = {1: 1.15, 8: 1.2, 64: 1.5}


def main() -> None:
    """Print the three measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=300, help="photos of the second and third measurement (default: 300)")
    count = parser.parse_args().photos
    network, processor = qwen()
    shapes = sizes_of_photos(PHOTOS)
    for devices, bound in BOUNDS.items():
        print(count_patches(processor, network, shapes, devices, bound), flush=True)
    photos = [jpeg(shape, number) for number, shape in enumerate(shapes[:count])]
    workers = min(os.cpu_count() or 1, MOST_THREADS)
    threads = rate(ThreadPoolExecutor(workers), photos, processor)
    with ProcessPoolExecutor(workers, get_context("spawn"), keep, (processor,)) as pool:
        list(pool.map(make_with_kept, photos[: 8 * workers]))  # until all workers have started
        processes = rate(pool, photos, None)
    print(f"{workers} workers, photos a second: threads {threads:.1f}, processes {processes:.1f}, ratio {threads / processes:.2f}")
    for line in overlap(processor, network, photos):
        print(line, flush=True)


def qwen() -> tuple:
    """Return the network's config and the processor of configs/3b.py, with a small vocabulary."""
    config = load_config("configs/3b.py")
    network = model_config(config)
    architecture = network.architecture
    images = family(network.backbone).Images.from_run(config.data, architecture, None)
    with tempfile.TemporaryDirectory() as scratch:
        texts, file = ["a photo of a cat"] * 100, Path(scratch) / "tokenizer.json"
        vocabulary = tokenizer.train(texts, file, family(network.backbone), vocabulary=700)
    limits = Limits(*architecture.default_row(images), 512, 16, 80)
    return network, family(network.backbone).Processor(vocabulary, images, limits)


def sizes_of_photos(count: int) -> list[tuple[int, int]]:
    """Return (width, height) of photos: areas are log-normal around 640 x 480, and ratios of the sides go up to 3."""
    rng = np.random.default_rng(SEED)
    sides = np.sqrt(640 * 480 * np.exp(rng.normal(0, 0.9, count)))
    ratio = np.exp(rng.uniform(-0.55, 0.55, count))
    return [(max(28, int(side * r)), max(28, int(side / r))) for side, r in zip(sides, ratio, strict=True)]


def count_patches(processor, network, shapes: list[tuple[int, int]], devices: int, bound: float) -> str:
    """Return a line on the schedule's calls for photos of these sizes."""
    sizes = np.array([processor.size({"image": shape}, "document")[:2] for shape in shapes])
    limits, calls = processor.limits, []
    schedule, chunk = (
        Schedule(limits.tokens, limits.patches, network.meta_tokens("document", 64), 64, devices),
        CHUNK_ITEMS * devices,
    )
    for first in range(0, len(sizes), chunk):
        sizes_of_chunk, is_last = sizes[first : first + chunk], first + chunk >= len(sizes)
        schedule.add(np.arange(first, first + len(sizes_of_chunk)), sizes_of_chunk)
        if schedule.is_full or is_last:
            calls += schedule.take(is_last)
    sent, needed = sum(call.size * call.row.patches for call in calls), int(sizes[:, 1].sum())
    programs = len({(call.size, call.row) for call in calls})
    return (
        f"{devices:3} devices: {len(calls)} calls of {programs} programs, patches sent {sent:,} for {needed:,} needed: "
        f"{sent / needed:.3f} (at most {bound})"
    )


def jpeg(shape: tuple[int, int], number: int) -> bytes:
    """Return the JPEG of a photo of soft noise."""
    small = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize(shape, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make(processor, photo: bytes) -> int:
    """Make the arrays of a photo, and return the number of its tokens."""
    return len(processor.document({"image": photo}).tokens)


def keep(processor) -> None:
    """Keep the processor in a worker process."""
    global _processor
    _processor = processor


def make_with_kept(photo: bytes) -> int:
    """`make` in a worker process. It sends no arrays back, which real workers would have to."""
    return make(_processor, photo)


def rate(pool: Executor, photos: list[bytes], processor) -> float:
    """Return photos a second; without a processor, by that of the worker process."""
    start = time.perf_counter()
    list(pool.map(make_with_kept if processor is None else partial(make, processor), photos))
    return len(photos) / (time.perf_counter() - start)


class Pending(NamedTuple):
    """Vectors that a device is computing, with the attributes of a JAX array that the encoder reads.

    Attributes:
      shape: shape of the vectors.
      wait: returns when they are computed.
    """

    shape: tuple[int, ...]
    wait: Callable

    @property
    def addressable_shards(self) -> list[SimpleNamespace]:
        """One shard of all vectors, once they are computed."""
        self.wait()
        return [SimpleNamespace(index=(slice(None),), data=np.ones(self.shape, np.float32))]


class Accelerator:
    """Sleeps a time for each row, one call after another."""

    def __init__(self, seconds_a_row: float):
        self._seconds, self._queue, self.rows = seconds_a_row, ThreadPoolExecutor(1), 0

    def __call__(self, _, batch: Batch) -> Pending:
        """Start a call of the network."""
        self.rows += len(batch.reads)
        return Pending((*batch.reads.shape, 2), self._queue.submit(time.sleep, self._seconds * len(batch.reads)).result)


class Cores:
    """Multiplies matrices with XLA for each row, on all cores of the host."""

    def __init__(self, products_a_row: float):
        self._products, matrix = products_a_row, jnp.full((512, 512), 1 / 512)
        self._multiply = jax.jit(lambda count: jax.lax.fori_loop(0, count, lambda _, product: matrix @ product, matrix))
        self.compute(0)

    def compute(self, rows: int) -> None:
        """Multiply for this number of rows, and wait for the result."""
        self._multiply(round(self._products * rows)).block_until_ready()

    def __call__(self, _, batch: Batch) -> Pending:
        """Start a call of the network."""
        product = self._multiply(round(self._products * len(batch.reads)))
        return Pending((*batch.reads.shape, 2), product.block_until_ready)


class Cost(NamedTuple):
    """Seconds by the clock, and the sum over all cores."""

    seconds: float
    core_seconds: float


def measure(function: Callable) -> Cost:
    """Return the cost of a call, with all threads of this process."""
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    function()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return Cost(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def overlap(processor, network, photos: list[bytes]) -> Iterator[str]:
    """Yield a line for an accelerator and one for the host's cores; computing alone takes as long as decoding alone."""
    mesh, items = make_mesh(devices=jax.devices()[:1]), [{"image": photo} for photo in photos]

    def stream(encode: Callable) -> Cost:
        encoder = Encoder(network, processor, mesh, encode, 2)
        return measure(lambda: list(encoder.blocks({}, items, "document", 64)))

    stream(first := Accelerator(0.0))  # not timed: the first stream is the slowest
    rows, product = first.rows, measure(partial(Cores(1).compute, 300)).seconds / 300
    accelerator, cores = [], []
    for _ in range(ROUNDS):
        decoding = stream(Accelerator(0.0))
        accelerator.append((decoding.seconds, stream(Accelerator(decoding.seconds / rows)).seconds))
        host = Cores(decoding.seconds / rows / product)
        computing = measure(partial(host.compute, rows))
        floor = (decoding.core_seconds + computing.core_seconds) / (os.cpu_count() or 1)
        cores.append((decoding.seconds, computing.seconds, floor, stream(host).seconds))
    decoding, both = np.median(accelerator, axis=0)
    yield (
        f"with an accelerator: decoding alone {decoding:.2f} s, computing alone the same, both {both:.2f} s: "
        f"{ratios([both / decoding for decoding, both in accelerator])} x the slower of the two (at most 1.15)"
    )
    decoding, computing, floor, both = np.median(cores, axis=0)
    yield (
        f"on the host's cores: decoding alone {decoding:.2f} s, computing alone {computing:.2f} s, both {both:.2f} s: "
        f"{ratios([both / floor for *_, floor, both in cores])} x the {floor:.2f} s of work for all cores"
    )


def ratios(values: list[float]) -> str:
    """Format the median and the range of values."""
    return f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
