"""Measures the encoder on 1,000 photos of very different sizes: `python benchmarks/encode.py`.

1. Patches sent to the devices for each that a photo needs, and programs, on 1, 8 and 64 devices: by the schedule alone, which is a
   function of sizes.
2. Threads against processes: photos a second from JPEG bytes to arrays, by each.
3. Overlap. Next to an accelerator, which leaves the host's cores free: the time of a stream against the slower of decoding and
   computing alone; a thread that sleeps stands for it. On the host's cores, which decoding alone fills: the time of a stream
   against the core-seconds of decoding and computing, divided by the cores.
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
from metaembed_jax.encoding.encoder import CHUNK, Encoder
from metaembed_jax.encoding.reading import MOST_THREADS
from metaembed_jax.encoding.schedule import Schedule
from metaembed_jax.mesh import make_mesh
from metaembed_jax.network_config import model_config

PHOTOS, SEED, ROUNDS = 1000, 0, 3
BOUNDS = {1: 1.15, 8: 1.2, 64: 1.5}


def main() -> None:
    """Prints the three parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=300, help="photos that are decoded in parts 2 and 3")
    count = parser.parse_args().photos
    network, processor = qwen()
    shapes = sizes_of_photos(PHOTOS)
    for devices, bound in BOUNDS.items():
        print(counted(processor, network, shapes, devices, bound), flush=True)
    photos = [jpeg(shape, number) for number, shape in enumerate(shapes[:count])]
    workers = min(os.cpu_count() or 1, MOST_THREADS)
    threads = rate(ThreadPoolExecutor(workers), photos, processor)
    with ProcessPoolExecutor(workers, get_context("spawn"), take, (processor,)) as pool:
        list(pool.map(make_with_taken, photos[: 8 * workers]))  # until all are started
        processes = rate(pool, photos, None)
    print(f"{workers} workers, photos a second: threads {threads:.1f}, processes {processes:.1f}, ratio {threads / processes:.2f}")
    for line in overlap(processor, network, photos):
        print(line, flush=True)


def qwen() -> tuple:
    """The network's config and the processor of a 3b, with a small vocabulary."""
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
    """(width, height): the area is log-normal around 640 x 480, sides up to 1 : 3."""
    rng = np.random.default_rng(SEED)
    sides = np.sqrt(640 * 480 * np.exp(rng.normal(0, 0.9, count)))
    ratio = np.exp(rng.uniform(-0.55, 0.55, count))
    return [(max(28, int(side * r)), max(28, int(side / r))) for side, r in zip(sides, ratio, strict=True)]


def counted(processor, network, shapes: list[tuple[int, int]], devices: int, bound: float) -> str:
    """A line on the calls that the schedule makes of items of these sizes."""
    sizes = np.array([processor.size({"image": shape}, "document")[:2] for shape in shapes])
    limits, calls = processor.limits, []
    schedule, chunk = Schedule(limits.tokens, limits.patches, network.meta_tokens("document", 64), 64, devices), CHUNK * devices
    for first in range(0, len(sizes), chunk):
        part, is_last = sizes[first : first + chunk], first + chunk >= len(sizes)
        schedule.add(np.arange(first, first + len(part)), part)
        if schedule.is_full or is_last:
            calls += schedule.take(is_last)
    sent, needed = sum(call.size * call.row.patches for call in calls), int(sizes[:, 1].sum())
    programs = len({(call.size, call.row) for call in calls})
    return (
        f"{devices:3} devices: {len(calls)} calls of {programs} programs, patches sent {sent:,} for {needed:,} needed: "
        f"{sent / needed:.3f} (at most {bound})"
    )


def jpeg(shape: tuple[int, int], number: int) -> bytes:
    """A photo of soft noise."""
    small = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize(shape, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make(processor, photo: bytes) -> int:
    """One photo to arrays; the bytes that a process would send back."""
    return len(processor.document({"image": photo}).tokens)


def take(processor) -> None:
    """Keeps the processor in a worker process."""
    global _processor
    _processor = processor


def make_with_taken(photo: bytes) -> int:
    """As `make`, in a worker process; arrays stay there, which spares processes what they would have to send."""
    return make(_processor, photo)


def rate(pool: Executor, photos: list[bytes], processor) -> float:
    """Photos a second."""
    start = time.perf_counter()
    list(pool.map(make_with_taken if processor is None else partial(make, processor), photos))
    return len(photos) / (time.perf_counter() - start)


class Pending(NamedTuple):
    """Vectors that a device still computes, as the encoder fetches them.

    Attributes:
      wait: returns when they are computed.
    """

    shape: tuple[int, ...]
    wait: Callable

    @property
    def addressable_shards(self) -> list[SimpleNamespace]:
        """All in one, once they are computed."""
        self.wait()
        return [SimpleNamespace(index=(slice(None),), data=np.ones(self.shape, np.float32))]


class Accelerator:
    """Takes a time for each row, one call after the other, and leaves the host's cores free."""

    def __init__(self, seconds_a_row: float):
        self._seconds, self._queue, self.rows = seconds_a_row, ThreadPoolExecutor(1), 0

    def __call__(self, _, batch: Batch) -> Pending:
        """A call of the network; it returns before the vectors are computed."""
        self.rows += len(batch.reads)
        return Pending((*batch.reads.shape, 2), self._queue.submit(time.sleep, self._seconds * len(batch.reads)).result)


class Cores:
    """Multiplies matrices with XLA for each row, on all cores of the host."""

    def __init__(self, products_a_row: float):
        self._products, matrix = products_a_row, jnp.full((512, 512), 1 / 512)
        self._multiply = jax.jit(lambda count: jax.lax.fori_loop(0, count, lambda _, product: matrix @ product, matrix))
        self.compute(0)

    def compute(self, rows: int) -> None:
        """Compute for so many rows, and wait until it is done."""
        self._multiply(round(self._products * rows)).block_until_ready()

    def __call__(self, _, batch: Batch) -> Pending:
        """A call of the network; it returns before the vectors are computed."""
        product = self._multiply(round(self._products * len(batch.reads)))
        return Pending((*batch.reads.shape, 2), product.block_until_ready)


class Cost(NamedTuple):
    """Seconds by the clock, and of all cores together."""

    seconds: float
    core_seconds: float


def measure(function: Callable) -> Cost:
    """The cost of a call, with all threads of this process."""
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    function()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return Cost(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def overlap(processor, network, photos: list[bytes]) -> Iterator[str]:
    """Yield a line on an accelerator and one on the host's cores; each computes for as long as decoding takes."""
    mesh, items = make_mesh(devices=jax.devices()[:1]), [{"image": photo} for photo in photos]

    def stream(encode: Callable) -> Cost:
        encoder = Encoder(network, processor, mesh, encode)
        return measure(lambda: list(encoder.blocks({}, items, "document", 64, start=0, size=len(items))))

    stream(first := Accelerator(0.0))  # slower than those behind it
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
        f"next to an accelerator: decoding alone {decoding:.2f} s, computing alone as long, both {both:.2f} s: "
        f"{ratios([both / decoding for decoding, both in accelerator])} x the slower of the two (at most 1.15)"
    )
    decoding, computing, floor, both = np.median(cores, axis=0)
    yield (
        f"on the host's cores: decoding alone {decoding:.2f} s, computing alone {computing:.2f} s, both {both:.2f} s: "
        f"{ratios([both / floor for *_, floor, both in cores])} x the {floor:.2f} s of work for all cores"
    )


def ratios(values: list[float]) -> str:
    """The median and the range."""
    return f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
