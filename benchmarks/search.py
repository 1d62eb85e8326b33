"""Time searches on this machine's CPU against other libraries, on the same vectors in one run: `python benchmarks/search.py`.

Scores of all documents, and the ten best by our index, resident and streamed, in each of its types:

    batch     20,000 documents of 64 vectors by 32 queries of 16, 128 wide
    single    100,000 documents of 8 vectors by one query of 4, 128 wide
    one page  20,000 documents of 64 vectors by one query of 16, 128 wide
    wide      5,000 documents of 64 vectors by 8 queries of 16, 3584 wide, as MetaEmbed-7B has them

Searches by engines that also approximate; --run takes the vectors of a run in place of random ones:

    staged    15,943 documents of 64 vectors by 1,457 queries of 16, 8 wide: our index in stages 2:4:146>16:64, whose recall
              means something only for vectors of a run
    recall    2,000 documents of 64 vectors by 32 queries of 16, 128 wide, near documents: our index, fast-plaid, xtr-warp-rs and
              qdrant-edge-py, with the recall of the ten best, the bytes of each index, and the time of all queries and of one

Peers are in `search_peers.py`. The answers of each are first compared with exact search: the scores of a library must be equal, and
those of the ten best of an exact engine. The recall of others is their share of documents that are no worse than the tenth best.
Times are medians over rounds, all sides in turns; rates are compared with that of a large float32 matmul in the same run. Extra
memory is the rise of the peak memory during a call of `maxsim`, and during a search of a streamed index, in a separate process.
`--device-run=FILE` times our package alone on a GPU, a TPU or the CPU: `search_device.py`.
"""

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from memory import memory, reset_peak
from search_device import device_run
from search_peers import Engine, K, our_engines, peer_engines, scorers, temporary_folder
from timing import MATMUL_FLOPS, matmul, race, random_vectors, unit

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

    def __str__(self) -> str:
        return ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in self._asdict().items())


CASES = {
    "batch": Case(32, 16, 20_000, 64, 128),
    "single": Case(1, 4, 100_000, 8, 128),
    "one page": Case(1, 16, 20_000, 64, 128),
    "wide": Case(8, 16, 5_000, 64, 3584),
}
ENGINE_CASES = {"staged": Case(1_457, 16, 15_943, 64, 8), "recall": Case(32, 16, 2_000, 64, 128)}
DEFAULT = ["one page", "batch", "staged", "recall"]  # some five minutes on two cores
STAGES = [(2, 4, 146), (16, 64)]
NOISE = 0.7  # length of the noise of a query that is near a document
TOPICS = 20  # of random documents: engines that cluster vectors need clusters


def main() -> None:
    """Run the races."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="+", choices=[*CASES, *ENGINE_CASES], default=DEFAULT, help=f"which races (default: {', '.join(DEFAULT)})"
    )
    parser.add_argument("--rounds", type=int, default=3, help="calls of each side (default: 3)")
    parser.add_argument(
        "--run", help="a run, for the vectors of staged and recall: its documents and the queries of its test split"
    )
    parser.add_argument("--data", default="data", help="config.data.dir of that run (default: data)")
    documents = ENGINE_CASES["recall"].documents
    parser.add_argument("--documents", type=int, default=documents, help=f"of recall; peers build slowly (default: {documents})")
    parser.add_argument(
        "--device-run", type=Path, metavar="FILE", help="time our package on this machine's devices, and write FILE"
    )
    parser.add_argument("--memory", choices=tuple(CASES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(extra_memory(CASES[arguments.memory])))
        return
    if arguments.device_run:
        device_run(arguments.device_run, arguments.rounds)
        return
    for name in arguments.cases:
        if name in CASES:
            race_scores(name, CASES[name], arguments.rounds)
            continue
        case = ENGINE_CASES[name]._replace(**({"documents": arguments.documents} if name == "recall" else {}))
        query, document = of_run(arguments.run, arguments.data) if arguments.run else near_documents(case)
        print(f"{name}: " + (f"stages {STAGES}" if name == "staged" else "all vectors"))
        if name == "staged":
            race_stages(query, document, arguments.rounds)
        else:
            race_engines(query[: case.queries], document[: case.documents], arguments.rounds)


def race_scores(name: str, case: Case, rounds: int) -> None:
    """Race libraries that score all documents, and our indexes, which return the ten best."""
    command = [sys.executable, __file__, f"--memory={name}"]  # first, before this process holds vectors
    megabytes = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    query = random_vectors(1, case.queries, case.query_vectors, case.width)
    document = random_vectors(0, case.documents, case.document_vectors, case.width)
    sides = scorers(query, document)
    expected = sides["metaembed_jax"]()
    for side, score in sides.items():
        np.testing.assert_allclose(score(), expected, rtol=1e-4, atol=1e-4, err_msg=side)
    with temporary_folder() as folder:
        engines = our_engines(document, Path(folder))
        recalls = check(engines, query, expected)
        sides |= {side: functools.partial(engine.search, query) for side, engine in engines.items()}
        seconds = race(sides | {"matmul": matmul()}, rounds)
    peak = MATMUL_FLOPS / seconds.pop("matmul")
    print(
        f"{name}: {case}; {case.flops / 1e9:.1f} GFLOP, a matmul at {peak / 1e9:.0f} GFLOP/s, "
        f"extra memory {megabytes[0]:.0f} MB, of the index {megabytes[1]:.0f} MB"
    )
    for side, value in seconds.items():
        rate = case.flops / value
        figures = f"{value * 1e3:9.1f} ms {rate / 1e9:7.1f} GFLOP/s, {rate / peak:4.0%} of the matmul's"
        against = f", {seconds['maxsim-cpu'] / value:5.2f} x as fast as maxsim-cpu" if "maxsim-cpu" in seconds else ""
        index = f", {engines[side].size / 1e6:6.1f} MB, recall {recalls[side]:6.1%}" if side in engines else ""
        print(f"  {side:26}{figures}{against}{index}", flush=True)


def race_stages(query: np.ndarray, document: np.ndarray, rounds: int) -> None:
    """Time our index in two stages."""
    with temporary_folder() as folder:
        engines = our_engines(document, Path(folder), STAGES)
        print_engines(engines, query, document, rounds)


def race_engines(query: np.ndarray, document: np.ndarray, rounds: int) -> None:
    """Race engines that return the ten best."""
    with temporary_folder() as folder:
        engines = our_engines(document, Path(folder))
        halved = our_engines(document[:, : document.shape[1] // 2], Path(folder) / "half", dtypes=("int8",))
        engines |= {f"{side}, half the vectors": engine for side, engine in halved.items()}
        engines |= peer_engines(document, Path(folder))
        print_engines(engines, query, document, rounds)


def print_engines(engines: dict[str, Engine], query: np.ndarray, document: np.ndarray, rounds: int) -> None:
    """Check engines, time them with all queries and with one, and print a line for each."""
    recalls = check(engines, query, np.asarray(maxsim(query, jnp.asarray(document))))
    together = race({side: functools.partial(engine.search, query) for side, engine in engines.items()}, rounds)
    for engine in engines.values():
        engine.search(query[:1])  # compiles
    alone = race({side: functools.partial(engine.search, query[:1]) for side, engine in engines.items()}, max(rounds, 5))
    items, vectors, width = document.shape
    print(f"  {items:,} documents of {vectors} x {width}, {len(query):,} queries of {query.shape[1]}, top {K}")
    print(f"  {'':38} {'recall':>7} {'MB':>7} {'built, s':>8} {'ms a query, all':>16} {'ms, one query':>14}")
    for side, engine in engines.items():
        figures = f"{recalls[side]:7.1%} {engine.size / 1e6:7.1f} {engine.seconds:8.1f}"
        print(f"  {side:38} {figures} {together[side] * 1e3 / len(query):16.3f} {alone[side] * 1e3:14.2f}", flush=True)


def check(engines: dict[str, Engine], query: np.ndarray, scores_QN: np.ndarray) -> dict[str, float]:
    """Return the recall of each engine, and compile its search.

    Args:
      scores_QN: exact scores of all documents.

    Raises:
      AssertionError: the best documents of an exact engine have other scores than those of exact search.
    """
    recalls, best_Qk = {}, -np.sort(-scores_QN, axis=1)[:, :K]
    for side, engine in engines.items():
        numbers_Qk = engine.search(query)
        scores_Qk = np.where(numbers_Qk < 0, -np.inf, np.take_along_axis(scores_QN, numbers_Qk, axis=1))
        if engine.is_exact:
            np.testing.assert_allclose(scores_Qk, best_Qk, rtol=1e-4, atol=1e-4, err_msg=side)
        recalls[side] = float(np.mean(scores_Qk >= best_Qk[:, -1:] - 1e-4))
    return recalls


def near_documents(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Return random documents, each about a topic, and queries near the first vectors of some."""
    topics = random_vectors(2, TOPICS, case.document_vectors, case.width)
    document = random_vectors(0, case.documents, case.document_vectors, case.width)
    document = unit(document + topics[np.arange(case.documents) % TOPICS])
    rows = np.random.default_rng(1).integers(0, case.documents, case.queries)
    noise = NOISE * random_vectors(3, case.queries, case.query_vectors, case.width)
    return unit(document[rows, : case.query_vectors] + noise), document


@functools.cache
def of_run(run: str, data: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the queries of the test split of a run's first source, and the documents of all its splits."""
    from encoded_source import encode_source  # the other vectors need no data

    source = json.loads((Path(run) / "run.json").read_text())["config"]["data"]["sources"][0][0]
    document, queries = encode_source(run, source, data)
    return queries["test"], document


def extra_memory(case: Case) -> tuple[float, float]:
    """Return the megabytes that `maxsim`, and a search of a streamed index, add to the vectors and the compiled program."""
    query = random_vectors(1, case.queries, case.query_vectors, case.width)
    document = random_vectors(0, case.documents, case.document_vectors, case.width)
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
