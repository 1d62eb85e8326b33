"""Peers of `search.py`: libraries that score all documents, and engines that return the ten best. Each races if it is installed.

    pip install maxsim-cpu late-interaction-kernels colpali-engine sentence-transformers
    pip install fast-plaid xtr-warp-rs 'metaembed-jax[qdrant-edge]'

fast-plaid and xtr-warp-rs are built against one release of torch each; install them in an environment of their own.
"""

import functools
import importlib.util
import logging
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from timing import folder_bytes

import metaembed_jax as me
from metaembed_jax.late_interaction.maxsim import maxsim

K = 10  # results of a search
NARROW = 256  # maxsim-cpu fails on wider vectors
THREADS = 2  # of peers that take their number


class Engine(NamedTuple):
    """An index that returns the ten best.

    Attributes:
      search: called with queries [Q, R, D], returns the numbers of documents [Q, K]; -1 for those that are missing.
      size: bytes of the index.
      seconds: time to build it.
      is_exact: its results are those of exact search.
    """

    search: Callable
    size: int
    seconds: float
    is_exact: bool = False


def has(*modules: str) -> bool:
    """Return whether all modules are installed."""
    return all(importlib.util.find_spec(module) for module in modules)


def scorers(query: np.ndarray, document: np.ndarray) -> dict[str, Callable]:
    """Return a call for ours and for each installed peer, which returns all scores."""
    on_device = jnp.asarray(document)
    sides = {"metaembed_jax": lambda: np.asarray(maxsim(query, on_device))}
    if has("maxsim_cpu") and query.shape[2] <= NARROW:
        import maxsim_cpu

        sides["maxsim-cpu"] = lambda: np.stack([maxsim_cpu.maxsim_scores(query_RD, document) for query_RD in query])
    if has("torch"):
        import torch

        query_torch, document_torch = torch.from_numpy(query), torch.from_numpy(document)
        if score := colpali():
            sides["colpali-engine"] = lambda: score(query_torch, document_torch, device="cpu").numpy()
        if has("sentence_transformers"):
            from sentence_transformers.util import maxsim as torch_maxsim

            sides["sentence-transformers"] = lambda: torch_maxsim(query_torch, document_torch).numpy()
        if has("late_interaction_kernels"):
            from late_interaction_kernels import MaxSimScorer

            # On a CPU this is its reference in torch; queries go one by one, because it keeps all similarities.
            scorer = MaxSimScorer(normalize=False)
            sides["late-interaction-kernels"] = lambda: torch.cat(
                [scorer.score(query_torch[n : n + 1], document_torch) for n in range(len(query_torch))]
            ).numpy()
    sides["NumPy"] = lambda: with_numpy(query, document)
    return sides


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


def our_engines(document: np.ndarray, folder: Path, budget=None, dtypes=("float32", "bfloat16", "int8")) -> dict[str, Engine]:
    """Build our index in each type, and load it resident and streamed."""
    engines = {}
    for dtype in dtypes:
        start, path = time.perf_counter(), folder / dtype
        me.Index.build(document, dtype=dtype, path=path)
        seconds = time.perf_counter() - start
        size = folder_bytes(path, "*/vectors*") + folder_bytes(path, "*/scales*")
        for resident in (True, False):
            search = functools.partial(_search_index, me.Index.load(path, resident=resident), budget)
            engines[f"Index, {dtype}, {'resident' if resident else 'streamed'}"] = Engine(
                search, size, seconds, dtype == "float32" and not budget
            )
    return engines


def _search_index(index: "me.Index", budget, query: np.ndarray) -> np.ndarray:
    return index.search(query, K, budget).ids.astype(np.int64)


def peer_engines(document: np.ndarray, folder: Path) -> dict[str, Engine]:
    """Build the index of each installed peer, with its defaults; and, of those that round, with more bits or more lists."""
    engines = {}
    if has("fast_plaid"):
        for bits in (4, 8):
            engines |= fast_plaid(document, folder / f"plaid-{bits}", bits)
    if has("xtr_warp"):
        engines |= xtr_warp(document, folder / "warp")
    if has("qdrant_client", "qdrant_edge"):
        engines |= qdrant_edge(document, folder)
    return engines


def fast_plaid(document: np.ndarray, folder: Path, bits: int) -> dict[str, Engine]:
    """Build fast-plaid's index, which scores documents again by rounded vectors."""
    import torch
    from fast_plaid import search

    def run(query: np.ndarray, probes: int) -> np.ndarray:
        results = index.search(torch.from_numpy(query), K, n_ivf_probe=probes, show_progress=False, n_processes=1)
        return _numbers(results)

    start, index = time.perf_counter(), search.FastPlaid(str(folder), device="cpu")
    index.create(list(torch.from_numpy(document)), nbits=bits)
    seconds, size = time.perf_counter() - start, folder_bytes(folder)
    return {
        f"fast-plaid, {bits} bits, {probes} lists": Engine(functools.partial(run, probes=probes), size, seconds)
        for probes in (8, 32)
    }


def _numbers(results: list[list[tuple[int, float]]]) -> np.ndarray:
    """Return the numbers of documents [Q, K] of results; -1 where a query has fewer."""
    return np.array([([number for number, _ in result] + [-1] * K)[:K] for result in results])


def xtr_warp(document: np.ndarray, folder: Path) -> dict[str, Engine]:
    """Build xtr-warp-rs's index, which sums the similarities of vectors in some lists, and estimates the others."""
    import torch
    from xtr_warp.search import XTRWarp

    def run(query: np.ndarray, **options) -> np.ndarray:
        results = index.search(torch.from_numpy(query), K, num_threads=THREADS, show_progress=False, **options)
        return _numbers(results)

    logging.getLogger("xtr_warp").setLevel(logging.ERROR)
    start, index = time.perf_counter(), XTRWarp(str(folder))
    index.create(list(torch.from_numpy(document)), device="cpu", show_progress=False)
    index.load("cpu")
    seconds, size = time.perf_counter() - start, folder_bytes(folder)
    wide = {"nprobe": 128, "bound": 1024}
    return {
        "xtr-warp-rs": Engine(run, size, seconds),
        "xtr-warp-rs, 128 lists": Engine(functools.partial(run, **wide), size, seconds),
    }


def qdrant_edge(document: np.ndarray, folder: Path) -> dict[str, Engine]:
    """Build a collection of Qdrant's engine, with the graph of the first vectors."""
    from metaembed_jax.retrieval.qdrant import QdrantIndex

    def run(query: np.ndarray, budget) -> np.ndarray:
        return collection.search(query, K, budget).ids.astype(np.int64)

    start, count = time.perf_counter(), document.shape[1]
    collection = QdrantIndex.create(f"edge:{folder}", "qdrant", document.shape[2], count, fingerprint="race")
    collection.add([str(number) for number in range(len(document))], document)
    collection.optimize()
    seconds, size = time.perf_counter() - start, folder_bytes(folder / "qdrant")
    return {"qdrant-edge-py, all vectors": Engine(functools.partial(run, budget=None), size, seconds, is_exact=True)}


def temporary_folder() -> tempfile.TemporaryDirectory:
    """Return a folder for indexes, removed after use."""
    return tempfile.TemporaryDirectory(prefix="race-", ignore_cleanup_errors=True)
