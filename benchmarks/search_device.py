"""Time our searches on this machine's devices, and write the figures: `python benchmarks/search.py --device-run=FILE`.

Needs nothing but the package. A few minutes on a GPU with 16 GB; on a CPU the sizes are a tenth. For each type of stored vectors a
resident index is searched by one query, eight and 32, by all vectors and in two stages. The file also has the rate of a matmul in
the same run, and the time of reading the vectors once, by a sum over them.
"""

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from search_peers import K, temporary_folder
from timing import MATMUL_SIDE, matmul, race, random_vectors

import metaembed_jax as me

DOCUMENTS, VECTORS, WIDTH, QUERY_VECTORS = 100_000, 64, 128, 16
QUERIES = (1, 8, 32)
STAGES = [(1, 1, 1000), (16, 64)]
LARGE_SIDE = 4 * MATMUL_SIDE  # of a matmul on an accelerator


def device_run(path: Path, rounds: int) -> None:
    """Time resident indexes of each type, and write a JSON file after each, so that a killed run keeps what it has."""
    device, is_cpu = jax.devices()[0], jax.default_backend() == "cpu"
    documents, side = (DOCUMENTS // 10, MATMUL_SIDE) if is_cpu else (DOCUMENTS, LARGE_SIDE)
    document = random_vectors(0, documents, VECTORS, WIDTH)
    query = random_vectors(1, max(QUERIES), QUERY_VECTORS, WIDTH)
    figures: dict = {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "host": platform.processor() or platform.machine(),
        "jax": jax.__version__,
        "metaembed_jax": me.__version__,
        "sizes": {"documents": documents, "vectors": VECTORS, "width": WIDTH, "query_vectors": QUERY_VECTORS, "k": K},
        "matmul_flops": {},
        "searches": [],
    }
    for dtype in (jnp.float32, jnp.bfloat16):
        (seconds,) = race({"matmul": matmul(side, dtype)}, rounds).values()
        figures["matmul_flops"][np.dtype(dtype).name] = 2 * side**3 / seconds
    with temporary_folder() as folder:
        for dtype in ("bfloat16", "int8", "float32"):
            time_index(figures, document, query, dtype, Path(folder) / dtype, rounds)
            path.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"written: {path}")


def time_index(figures: dict, document: np.ndarray, query: np.ndarray, dtype: str, folder: Path, rounds: int) -> None:
    """Build an index of a type, load it resident, and time its searches."""
    me.Index.build(document, dtype=dtype, path=folder)
    start = time.perf_counter()
    index = me.Index.load(folder, resident=True)
    index.search(query[:1], K)  # loads the vectors
    load_seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for kind in ("vectors", "scales") for file in folder.glob(f"*/{kind}*"))
    read = reading(size)
    searches = {
        (count, budget): (lambda count=count, budget=budget: index.search(query[:count], K, budget))
        for count in QUERIES
        for budget in (None, tuple(STAGES))
    }
    for call in searches.values():
        call()  # compiles
    seconds = race(searches | {"read": read}, rounds)
    floor = seconds.pop("read")
    print(f"{dtype}: {size / 1e9:.2f} GB, resident in {load_seconds:.1f} s, read once in {floor * 1e3:.2f} ms")
    for (count, budget), value in seconds.items():
        products = 2 * count * QUERY_VECTORS * document.size
        figures["searches"].append(
            {
                "dtype": dtype,
                "queries": count,
                "budget": budget,
                "seconds": value,
                "bytes": size,
                "read_seconds": floor,
                "flops": None if budget else products,
                "load_seconds": load_seconds,
            }
        )
        rate = "" if budget else f", {products / value / 1e12:8.2f} TFLOP/s, {value / floor:6.2f} x reading once"
        print(f"  {count:3} queries, {'in stages' if budget else 'all vectors'}: {value * 1e3:9.2f} ms{rate}", flush=True)


def reading(size: int) -> Callable:
    """Return a call that reads so many bytes of a device's memory once."""
    numbers = jnp.ones((size // 4 // WIDTH, WIDTH), jnp.float32)
    total = jax.jit(lambda x: x.sum())

    def call() -> None:
        total(numbers).block_until_ready()

    call()
    return call
