"""Worker processes: none outlives its parent."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Called in a worker process: it ends when its parent does, even one that was killed."""

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
