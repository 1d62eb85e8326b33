"""Worker processes: none outlives its parent."""

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from metaembed_jax.errors import UserError

Job, Chunk, Result = TypeVar("Job"), TypeVar("Chunk"), TypeVar("Result")
ROWS_OF_WORKER = 50_000  # a process takes about as long to start as for 20,000
MOST_WORKERS = 16  # each of them holds the libraries in memory


def end_with_parent() -> None:
    """End this worker process when its parent ends, even if that is killed."""

    def wait_for_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()


def workers_for(rows: int) -> int:
    """Return how many processes pay off for a task of a fraction of a millisecond a row; 0: this process alone is faster."""
    workers = min(os.cpu_count() or 1, MOST_WORKERS, rows // ROWS_OF_WORKER)
    return workers if workers > 1 else 0


def map_with(job: Job, function: Callable[[Job, Chunk], Result], chunks: Sequence[Chunk], workers: int) -> Iterator[Result]:
    """Yield function(job, chunk) of each chunk, in order.

    Args:
      job: is sent to each process once, which keeps the files that it opens.
      workers: processes next to this one; 0 for none.

    Raises:
      UserError: a process was killed.
    """
    if not workers:
        yield from (function(job, chunk) for chunk in chunks)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with concurrent.futures.ProcessPoolExecutor(workers, context, _take_job, (job, function)) as pool:
        try:
            yield from pool.map(_run_chunk, chunks)
        except BrokenProcessPool as error:
            raise UserError(
                f"one of {workers} worker processes was killed, most often for lack of memory: free some memory"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_task: tuple | None = None  # of a worker process, which does nothing else


def _take_job(job: Job, function: Callable[[Job, Chunk], Result]) -> None:
    global _task
    _task = job, function
    end_with_parent()


def _run_chunk(chunk: Chunk) -> Result:
    job, function = _task
    return function(job, chunk)
