"""Time exact MaxSim on this machine's CPU against other libraries, on the same vectors in one run: `python benchmarks/search.py`.

    batch     20,000 documents of 64 vectors by 32 queries of 16, 128 wide
    single    100,000 documents of 8 vectors by one query of 4, 128 wide
    one page  20,000 documents of 64 vectors by one query of 16, 128 wide
    wide      5,000 documents of 64 vectors by 8 queries of 16, 3584 wide, as MetaEmbed-7B has them

Peers are maxsim-cpu, colpali-engine's `score_multi_vector`, sentence-transformers' `maxsim`, and plain NumPy, each if it is
installed. Every peer's scores are checked to equal ours before anything is timed. Indexes return the ten best documents of each
query: ours from disk, in each of its types, and Qdrant embedded (only for "one page", because adding the vectors takes a minute).
Times are medians over rounds, and rates are compared with that of a large float32 matmul in the same run. Extra memory is the rise
of the peak memory during a call of `maxsim`, and during a search of the index, in a separate process.
"""

import argparse
import functools
import importlib.util
import json
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from memory import memory, reset_peak

import metaembed_jax as me
from metaembed_jax.late_interaction.maxsim import maxsim


class Case(NamedTuple):
    """The sizes of a race."""

    queries: int
    query_vectors: int
    documents: int
    document_vectors: int
    width: int

    @property
    def flops(self) -> int:
        """FLOPs of the similarities."""
        return 2 * self.queries * self.query_vectors * self.documents * self.document_vectors * self.width


CASES = {
    "batch": Case(32, 16, 20_000, 64, 128),
    "single": Case(1, 4, 100_000, 8, 128),
    "one page": Case(1, 16, 20_000, 64, 128),
    "wide": Case(8, 16, 5_000, 64, 3584),
}
NARROW = 256  # maxsim-cpu fails on wider vectors
K = 10  # results of an index


def main() -> None:
    """Race all libraries in each case, and print their times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES), help="which races (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="calls of each library (default: 5)")
    parser.add_argument("--memory", choices=tuple(CASES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(extra_memory(CASES[arguments.memory])))
        return
    for name in arguments.cases:
        case = CASES[name]
        command = [sys.executable, __file__, f"--memory={name}"]  # first, before this process holds vectors
        megabytes = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        query, document = vectors(case)
        sides = contenders(query, document)
        expected = sides["metaembed_jax"]()
        for side, score in sides.items():
            np.testing.assert_allclose(score(), expected, rtol=1e-4, atol=1e-4, err_msg=side)
        best = -np.sort(-expected, axis=1)[:, :K]
        searches = indexes(query, document, with_qdrant=name == "one page")
        for side, (search, tolerance) in searches.items():
            np.testing.assert_allclose(search()[0], best, rtol=tolerance, err_msg=side)
        sides |= {side: search for side, (search, _) in searches.items()}
        seconds = race(sides | {"matmul": matmul()}, arguments.rounds)
        peak = MATMUL_FLOPS / seconds.pop("matmul")
        sizes = ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in case._asdict().items())
        print(
            f"{name}: {sizes}; {case.flops / 1e9:.1f} GFLOP, a matmul at {peak / 1e9:.0f} GFLOP/s, "
            f"extra memory {megabytes[0]:.0f} MB, of the index {megabytes[1]:.0f} MB"
        )
        for side, value in seconds.items():
            rate, ratio = case.flops / value, value / seconds["metaembed_jax"]
            figures = f"{value * 1e3:9.1f} ms {rate / 1e9:7.1f} GFLOP/s, {rate / peak:4.0%} of the matmul's"
            print(f"  {side:22}{figures}, {ratio:5.2f} x our time", flush=True)


MATMUL_SIDE = 4096
MATMUL_FLOPS = 2 * MATMUL_SIDE**3


def matmul() -> Callable:
    """Return a call of a large matmul in JAX."""
    square = jnp.ones((MATMUL_SIDE, MATMUL_SIDE), jnp.float32)
    product = jax.jit(lambda x, y: x @ y)
    return lambda: product(square, square).block_until_ready()


def vectors(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Return random unit vectors of queries and documents, float32."""
    random = np.random.default_rng(0)
    arrays = []
    for items, count in ((case.queries, case.query_vectors), (case.documents, case.document_vectors)):
        x = random.standard_normal((items, count, case.width), np.float32)
        arrays.append(np.divide(x, np.sqrt(np.einsum("nrd,nrd->nr", x, x))[..., None], out=x))
    return arrays[0], arrays[1]


def contenders(query: np.ndarray, document: np.ndarray) -> dict[str, Callable]:
    """Return a call for ours and for each installed peer, which returns all scores."""
    on_device = jnp.asarray(document)
    sides = {"metaembed_jax": lambda: np.asarray(maxsim(query, on_device))}
    if importlib.util.find_spec("maxsim_cpu") and query.shape[2] <= NARROW:
        import maxsim_cpu

        sides["maxsim-cpu"] = lambda: np.stack([maxsim_cpu.maxsim_scores(query_RD, document) for query_RD in query])
    if importlib.util.find_spec("torch"):
        import torch

        query_torch, document_torch = torch.from_numpy(query), torch.from_numpy(document)
        if score := colpali():
            sides["colpali-engine"] = lambda: score(query_torch, document_torch, device="cpu").numpy()
        if importlib.util.find_spec("sentence_transformers"):
            from sentence_transformers.util import maxsim as torch_maxsim

            sides["sentence-transformers"] = lambda: torch_maxsim(query_torch, document_torch).numpy()
    sides["NumPy"] = lambda: with_numpy(query, document)
    return sides


def indexes(query: np.ndarray, document: np.ndarray, with_qdrant: bool) -> dict[str, tuple[Callable, float]]:
    """Return, for each index, a search for the ten best, and the relative tolerance of its scores, which its stored type sets."""
    built = {dtype: me.Index.build(document, dtype=dtype) for dtype in ("float32", "bfloat16", "int8")}
    tolerances = {"float32": 1e-4, "bfloat16": 1e-2, "int8": 1e-2}
    searches = {f"Index, {dtype}": (functools.partial(index.search, query, K), tolerances[dtype]) for dtype, index in built.items()}
    if with_qdrant and importlib.util.find_spec("qdrant_client"):
        from metaembed_jax.retrieval.qdrant import QdrantIndex

        collection = QdrantIndex.create(":memory:", "race", document.shape[2], document.shape[1], fingerprint="random")
        collection.add([str(n) for n in range(len(document))], document)
        searches["Qdrant, embedded"] = (functools.partial(collection.search, query, K), 1e-4)
    return searches


@functools.cache
def colpali() -> Callable | None:
    """Return colpali-engine's scoring function, without importing the package, which needs torchvision; None if not installed."""
    spec = importlib.util.find_spec("colpali_engine")
    if spec is None:
        return None
    package = types.ModuleType("colpali_engine")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["colpali_engine"] = package
    from colpali_engine.utils.processing_utils import BaseVisualRetrieverProcessor

    return BaseVisualRetrieverProcessor.score_multi_vector


def with_numpy(query: np.ndarray, document: np.ndarray, block: int = 100) -> np.ndarray:
    """Score by a matmul and a maximum for each block of documents."""
    flat, scores = query.reshape(-1, query.shape[2]), np.empty((len(query), len(document)), np.float32)
    for first in range(0, len(document), block):
        documents = document[first : first + block]
        similarity = (flat @ documents.reshape(-1, documents.shape[2]).T).reshape(*query.shape[:2], *documents.shape[:2])
        scores[:, first : first + block] = similarity.max(-1).sum(1)
    return scores


def race(sides: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Return the median time of each side in seconds; the sides are called in turns."""
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def extra_memory(case: Case) -> tuple[float, float]:
    """Return the megabytes that `maxsim`, and a search of an index, add to the vectors and the compiled program."""
    query, document = vectors(case)
    index = me.Index.build(document)
    on_device = jnp.asarray(document).block_until_ready()
    del document

    def peak(call: Callable) -> float:
        call()
        reset_peak()
        start = memory("VmHWM")
        call()
        return (memory("VmHWM") - start) / 1e6

    return peak(lambda: np.asarray(maxsim(query, on_device))), peak(lambda: index.search(query, K))


if __name__ == "__main__":
    main()
