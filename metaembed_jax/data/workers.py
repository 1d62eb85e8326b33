"""Worker processes, which end with their parent."""

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from metaembed_jax.errors import UserError

Job = TypeVar("Job")
Chunk = TypeVar("Chunk")
Result = TypeVar("Result")
ROWS_OF_WORKER = 50_000  # a process starts in about the time of 20,000 rows
MOST_WORKERS = 16  # each of them holds the libraries in memory


def end_with_parent() -> None:
    """End this worker process when its parent ends, even if that is killed."""
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_exit_after, args=(parent.join,), daemon=True).start()


def workers_for(rows: int) -> int:
    """Return the number of processes that pays off at a fraction of a millisecond a row; 0: this process alone is faster."""
    workers = min(os.cpu_count() or 1, MOST_WORKERS, rows // ROWS_OF_WORKER)
    return workers if workers > 1 else 0


def map_with(job: Job, function: Callable[[Job, Chunk], Result], chunks: Sequence[Chunk], workers: int) -> Iterator[Result]:
    """Yield function(job, chunk) of each chunk, in order.

    Args:
      job: is sent to each process once; the process keeps the files that it opens.
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


_task: tuple[Any, Callable]  # of a worker process, which has one


def _take_job(job: Job, function: Callable[[Job, Chunk], Result]) -> None:
    global _task
    _task = job, function
    end_with_parent()


def _run_chunk(chunk: Any) -> Any:
    job, function = _task
    return function(job, chunk)


def _exit_after(wait: Callable[[], object]) -> None:
    wait()
    os._exit(1)
