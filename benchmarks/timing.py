"""Times of calls in turns, the rate of a large matmul in the same run, and vectors to time with."""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

MATMUL_SIDE = 4096
REST_SECONDS = 0.3  # before a call: threads of BLAS and OpenMP spin for a while after one, on cores that the next side needs
MATMUL_FLOPS = 2 * MATMUL_SIDE**3


def race(sides: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Return the median time of each side in seconds; the sides are called in turns."""
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            time.sleep(REST_SECONDS)
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def matmul(side: int = MATMUL_SIDE, dtype=jnp.float32) -> Callable:
    """Return a call of a large matmul in JAX, compiled."""
    square = jnp.ones((side, side), dtype)
    product = jax.jit(lambda x, y: x @ y)

    def call() -> None:
        product(square, square).block_until_ready()

    call()
    return call


def unit(vectors: np.ndarray) -> np.ndarray:
    """Divide vectors [N, R, D] by their lengths, in place."""
    return np.divide(vectors, np.sqrt(np.einsum("nrd,nrd->nr", vectors, vectors))[..., None], out=vectors)


def random_vectors(seed: int, items: int, vectors: int, width: int) -> np.ndarray:
    """Return random unit vectors, float32 [N, R, D]."""
    return unit(np.random.default_rng(seed).standard_normal((items, vectors, width), np.float32))


def folder_bytes(folder: str | os.PathLike, pattern: str = "**/*") -> int:
    """Return the bytes that the files of a folder take on the disk; a sparse file takes less than its size."""
    return sum(path.stat().st_blocks * 512 for path in Path(folder).glob(pattern) if path.is_file())
