"""Measures the encoder on 1,000 photos of very different sizes: `python benchmarks/encode.py`.

1. Patches sent to the devices for each that a photo needs, and programs, on 1, 8 and 64 devices: by the schedule alone, which is a
   function of sizes.
2. Threads against processes: photos a second from JPEG bytes to arrays, by each.
3. Overlap: the time of a stream against the slower of decoding and computing alone. The network is a wait on the device's behalf,
   as an accelerator leaves the host's cores free.
"""

import argparse
import io
import os
import tempfile
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from metaembed_jax.backbones import family
from metaembed_jax.batch.items import Limits
from metaembed_jax.config import load_config, model_config
from metaembed_jax.data import tokenizer
from metaembed_jax.encoding.encoder import CHUNK, Encoder
from metaembed_jax.encoding.reading import MOST_THREADS
from metaembed_jax.encoding.schedule import Schedule
from metaembed_jax.sharding import make_mesh, named_sharding

PHOTOS, SEED = 1000, 0
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
    print(overlap(processor, network, photos), flush=True)


def qwen() -> tuple:
    """The network's config and the processor of a 3b, with a small vocabulary."""
    config = load_config("configs/3b.py", {})
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
    sizes = np.array([processor.size({"image": shape}, "candidate")[:2] for shape in shapes])
    limits, calls = processor.limits, []
    schedule, chunk = Schedule(limits.tokens, limits.patches, network.meta_tokens("candidate", 64), 64, devices), CHUNK * devices
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
    return len(processor.candidate({"image": photo}).tokens)


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


def overlap(processor, network, photos: list[bytes]) -> str:
    """A line on a stream whose devices take as long as decoding does."""
    mesh = make_mesh(devices=jax.devices()[:1])
    items = [{"image": photo} for photo in photos]

    def timed(seconds_a_row: float) -> tuple[float, int]:
        computed = []

        def wait(reads: np.ndarray) -> np.ndarray:
            time.sleep(seconds_a_row * len(reads))
            computed.append(len(reads))
            return np.ones((*reads.shape, 2), np.float32)

        def encode(_, batch):
            return jax.pure_callback(wait, jax.ShapeDtypeStruct((*batch.reads.shape, 2), jnp.float32), batch.reads)

        encoder = Encoder(network, processor, mesh, jax.jit(encode, out_shardings=named_sharding(mesh, ("batch", None, None))))
        start = time.perf_counter()
        list(encoder.blocks({}, items, "candidate", 64, start=0, size=len(items)))
        return time.perf_counter() - start, sum(computed)

    decoding, rows = timed(0.0)
    together, _ = timed(decoding / rows)
    return (
        f"decoding alone {decoding:.2f} s, computing alone {decoding:.2f} s, both {together:.2f} s: "
        f"{together / decoding:.2f} x the slower of the two"
    )


if __name__ == "__main__":
    main()
