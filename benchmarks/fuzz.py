"""Fuzz everything that reads a user's files, and compare what is accepted with the libraries that define the formats.

    python benchmarks/fuzz.py [--inputs=10000] [--seed=0] [--workers=2] [--only=KIND[:N]] [--save=runs/fuzz]

Each input is made from (seed, kind, number) by `fuzz_kinds`. It is a fault if reading it raises anything but a UserError, takes
more than `CPU_SECONDS`, ends the process, grows it by more than `GROWTH_MIB`, prints to stderr, or gives something else than the
reference: Pillow, pdfium, json, pyarrow, safetensors or transformers. A table says how many were accepted, refused and at fault;
each fault has the flag that repeats it, and its input is saved. The exit code is 1 if there are faults.

Images are read with a memory limit of `IMAGE_MIB`. This needs the development requirements, and Linux.
"""

import argparse
import collections
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

CPU_SECONDS = 20  # of an input; the first of a worker also imports libraries
GROWTH_MIB = 320  # of a worker's memory at an input: several copies of the largest image, and a decoder's own
IMAGE_MIB = 32
LIBTIFF = r"[A-Za-z0-9_.]+: "  # starts its own lines on stderr, which Pillow cannot stop; a warning of Python starts with a path
ADDRESS_GIB = 24  # of a worker, so that nothing harms the machine
SHARES = {"image": 36, "tiff": 8, "pdf": 10, "table": 16, "tensors": 10, "config": 12, "index": 8}  # of 100 inputs


def main() -> None:
    """Run the inputs, and print the table and the faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="of all kinds (default: 10000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--only", metavar="KIND[:N]", help=f"one kind of {', '.join(SHARES)}, or one of its inputs")
    parser.add_argument("--save", type=Path, default=Path("runs/fuzz"), help="folder of the inputs at fault (default: runs/fuzz)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        work(flags.seed)
        return
    start, jobs = time.time(), inputs(flags.inputs, flags.only)
    results = run(jobs, flags.seed, flags.workers, flags.save)
    faults = print_table(results, flags.seed)
    print(f"{len(jobs):,} inputs of seed {flags.seed} in {time.time() - start:,.0f} s")
    sys.exit(1 if faults else 0)


def inputs(count: int, only: str | None) -> list[tuple[str, int]]:
    """Return (kind, number) of each input; workers that take them in order import one kind's libraries at a time."""
    if only:
        kind, _, number = only.partition(":")
        return [(kind, int(number))] if number else [(kind, n) for n in range(count)]
    return [(kind, number) for kind, share in SHARES.items() for number in range(max(1, count * share // 100))]


def run(jobs: list[tuple[str, int]], seed: int, workers: int, save: Path) -> list[dict]:
    """Give the inputs to worker processes, and return {"kind", "number", "outcome", "text"} of each."""
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    results = []
    threads = [threading.Thread(target=_serve, args=(waiting, seed, save, results), daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.5)
        if sys.stderr.isatty():
            print(f"\r{len(results):,} of {len(jobs):,}", end="", file=sys.stderr)
    return sorted(results, key=lambda result: (list(SHARES).index(result["kind"]), result["number"]))


def _serve(waiting: queue.SimpleQueue, seed: int, save: Path, results: list[dict]) -> None:
    """Feed one worker, and start another where it ends."""
    worker = None
    with tempfile.TemporaryDirectory() as folder:
        while True:
            try:
                kind, number = waiting.get_nowait()
            except queue.Empty:
                break
            worker = worker or _start(seed, folder)
            print(kind, number, file=worker.stdin, flush=True)
            line = worker.stdout.readline()
            result = json.loads(line) if line else _death(worker, kind, number, Path(folder, "stderr"))
            if not line:
                worker = None
            if result["outcome"] == "fault" and Path(folder, "input").exists():  # not if the worker could not start
                (save / f"{kind}-{seed}-{number}").parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(Path(folder, "input"), save / f"{kind}-{seed}-{number}", dirs_exist_ok=True)
            results.append(result)
        if worker:
            worker.stdin.close()
            worker.wait()


def _start(seed: int, folder: str) -> subprocess.Popen:
    environment = {"METAEMBED_IMAGE_MIB": str(IMAGE_MIB), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    root = str(Path(__file__).parents[1])
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))), "MALLOC_ARENA_MAX": "2"}
    return subprocess.Popen(
        [sys.executable, __file__, "--worker", f"--seed={seed}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=Path(folder, "stderr").open("w"),
        text=True,
        cwd=folder,
        env=os.environ | environment,
    )


def _death(worker: subprocess.Popen, kind: str, number: int, stderr: Path) -> dict:
    code = worker.wait()
    reason = f"over {CPU_SECONDS} s of CPU" if code == -signal.SIGPROF else f"the process ended with {code}"
    last = stderr.read_text(errors="replace").strip().splitlines()[-1:]
    return {"kind": kind, "number": number, "outcome": "fault", "text": " ".join([reason, *last])}


def work(seed: int) -> None:
    """Read jobs from stdin, and write a line of JSON for each to stdout. The input is in the folder `input`."""
    import resource

    import fuzz_kinds
    from memory import memory, reset_peak

    from metaembed_jax.errors import UserError

    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_GIB << 30,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # a parent that has loaded libtpu ignores it
    answers, folder = os.fdopen(os.dup(1), "w"), Path("input")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the project prints lines about columns
    for line in sys.stdin:
        kind, number = line.split()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        result = {"kind": kind, "number": int(number)}
        make, check = fuzz_kinds.prepare(kind)
        try:
            content = make(fuzz_kinds.generator(seed, kind, int(number)), folder)
            printed = Path("stderr").stat().st_size
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # its default action ends the process, also in a library
            before = memory("VmRSS")
            reset_peak()
            try:
                result |= {"outcome": "accepted" if (answer := check(folder, content)) is None else "refused", "text": answer or ""}
            except UserError as error:
                result |= {"outcome": "refused", "text": str(error)}
            result["grown"] = (memory("VmHWM") - before) >> 20
            if result["grown"] > GROWTH_MIB:
                result |= {"outcome": "fault", "text": f"memory grew by {result['grown']} MiB: {result['text']}"}
            sys.stderr.flush()
            with Path("stderr").open(errors="replace") as file:
                file.seek(printed)
                lines = [line for line in file if not re.match(LIBTIFF, line)]
            if lines:
                result |= {"outcome": "fault", "text": f"printed {lines[0][:300]!r}"}
            elif result["outcome"] == "refused" and ("\n" in result["text"] or not result["text"]):
                result |= {"outcome": "fault", "text": f"an error of several lines, or none: {result['text'][:300]!r}"}
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            frame = next((frame for frame in reversed(frames) if "metaembed_jax" in frame.filename), frames[-1])
            text = f"{type(error).__name__}: {str(error)[:300]} ({Path(frame.filename).name}:{frame.lineno})"
            result |= {"outcome": "fault", "text": text}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(result), file=answers, flush=True)


def print_table(results: list[dict], seed: int) -> int:
    """Print the counts of each kind, the most that an input grew the process by, and the faults; return their number."""
    counts = collections.Counter((result["kind"], result["outcome"]) for result in results)
    print(f"{'kind':10}{'inputs':>8}{'accepted':>10}{'refused':>9}{'faults':>8}{'MiB':>6}")
    kinds = [kind for kind in SHARES if any(name == kind for name, _ in counts)]
    rows = [(kind, *(counts[kind, outcome] for outcome in ("accepted", "refused", "fault"))) for kind in kinds]
    rows.append(("all", *(sum(row[column] for row in rows) for column in (1, 2, 3))))
    for kind, accepted, refused, faults in rows:
        grown = max((result.get("grown", 0) for result in results if kind in (result["kind"], "all")), default=0)
        print(f"{kind:10}{accepted + refused + faults:8,}{accepted:10,}{refused:9,}{faults:8,}{grown:6,}")
    for result in results:
        if result["outcome"] == "fault":
            print(f"--seed={seed} --only={result['kind']}:{result['number']}  {result['text']}")
    return rows[-1][-1]


if __name__ == "__main__":
    main()
