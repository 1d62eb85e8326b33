"""The lock of a run's folder, on a disk or in a bucket: one writer at a time.

On a disk it is a lock of the operating system, which ends with the process. A bucket has no locks, so an object `lock`, the lease,
names the writer. A write must name the generation of the object that it replaces, so of two writers one fails. The holder renews
the lease. Another run takes it over once it was not renewed for `EXPIRE` seconds by the bucket's clock. A run removes its lease at
the end, but not if it is killed. The next run on the same machine sees that the process has ended, and continues at once; a run on
another machine waits until the lease expires.
"""

import contextlib
import email.utils
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from metaembed_jax import files
from metaembed_jax.errors import UserError

NAME = "lock"
RENEW, EXPIRE = 15.0, 60.0  # seconds


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; the folder is created if it does not exist.

    Raises:
      UserError: another run holds the lock, or the folder is not writable.
    """
    if not files.is_bucket(folder):
        with files.write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        busy = f"{folder} is being written by another run; wait for it to end, or choose another --workdir"
        with files.locked(folder / NAME, busy):
            yield
        return
    with files.write_errors(folder):
        lease = _Lease(folder)
    try:
        yield
    finally:
        lease.release()


class _State(NamedTuple):
    """The lease in the bucket.

    Attributes:
      generation: generation of the object.
      age: seconds since it was renewed.
      holder: token, host, process and machine of the writer that holds it.
    """

    generation: str
    age: float
    holder: dict


class _Lease:
    """A lease that a thread renews.

    Raises:
      UserError: another run holds it.
    """

    def __init__(self, folder: Path):
        self._path, self._files = folder / NAME, files.bucket_file_system()
        self._bucket, _, self._key = os.fspath(self._path).removeprefix(files.BUCKET).partition("/")
        self._holder = {"token": secrets.token_hex(8), "host": socket.gethostname(), "pid": os.getpid(), "machine": _machine()}
        self._generation = self._take()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Remove the lease."""
        if self._released.is_set():  # lost
            return
        self._released.set()
        self._thread.join()  # so that it does not renew a removed lease
        with contextlib.suppress(Exception):  # a lease that is not removed expires
            self._files.call("DELETE", "b/{}/o/{}", self._bucket, self._key, ifGenerationMatch=self._generation)

    def _take(self) -> str:
        first_state = None
        while state := self._read():
            first_state = first_state or state
            if state.generation != first_state.generation:  # renewed meanwhile
                break
            if state.age >= EXPIRE or _is_gone(state.holder):
                with contextlib.suppress(FileExistsError):
                    return self._put(state.generation)
                break
            if state is first_state:
                print(
                    f"{self._path.parent} was written {state.age:.0f} s ago by {_name(state.holder)}; "
                    f"waiting up to {EXPIRE - state.age:.0f} s to see whether that process still runs",
                    flush=True,
                )
            time.sleep(min(2.0, EXPIRE))
        else:
            with contextlib.suppress(FileExistsError):
                return self._put("0")
            state = self._read()
        raise UserError(
            f"{self._path.parent} is being written by another run, {_name(state.holder if state else {})}; "
            "wait for it to end, or choose another --workdir"
        )

    def _renew(self) -> None:
        while not self._released.wait(RENEW):
            with contextlib.suppress(Exception):  # the network may fail; the next try is before the lease expires
                try:
                    self._generation = self._put(self._generation)
                except FileExistsError:
                    if not self._released.is_set():
                        self._released.set()
                        self._stop()

    def _stop(self) -> None:
        """End this process at once: another one has taken the folder, and two writers would damage it."""
        state = None
        with contextlib.suppress(Exception):
            state = self._read()
        print(f"error: {self._path.parent} was taken over by {_name(state.holder if state else {})}", file=sys.stderr, flush=True)
        os._exit(2)

    def _read(self) -> _State | None:
        try:
            headers, content = self._files.call("GET", "b/{}/o/{}", self._bucket, self._key)
            metadata = json.loads(content)
            now = email.utils.parsedate_to_datetime(headers["Date"])
            age = (now - datetime.fromisoformat(metadata["updated"])).total_seconds()
            holder = files.read_json(self._path)
        except FileNotFoundError:
            return None
        except UserError:  # another file of this name
            holder = {}
        return _State(metadata["generation"], age, holder)

    def _put(self, generation: str) -> str:
        """Replace the object of a generation ("0": none) and return the new generation.

        Raises:
          FileExistsError: the object has another generation, and is not this lease.
        """
        sections = (json.dumps({"name": self._key}), json.dumps(self._holder))
        head = "--lease\nContent-Type: application/json; charset=UTF-8\n\n"
        body = "".join(f"{head}{section}\n" for section in sections) + "--lease--"
        url = self._files.base.replace("/storage/v1", "/upload/storage/v1") + "b/{}/o"
        headers = {"Content-Type": 'multipart/related; boundary="lease"'}
        try:
            request = dict(uploadType="multipart", ifGenerationMatch=generation, headers=headers, data=body.encode())
            return self._files.call("POST", url, self._bucket, **request, json_out=True)["generation"]
        except FileExistsError:
            state = self._read()  # if the answer was lost, the retry finds its own object
            if state and state.holder.get("token") == self._holder["token"]:
                return state.generation
            raise


def _machine() -> str:
    """Return the boot and the namespace in which this machine's process ids are valid; empty if unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _is_gone(holder: dict) -> bool:
    """Return whether a holder was a process of this machine that has ended."""
    if not holder.get("machine") or holder["machine"] != _machine() or "pid" not in holder:
        return False
    return not Path(f"/proc/{holder['pid']}").exists()


def _name(holder: dict) -> str:
    return f"process {holder.get('pid', '?')} of {holder.get('host', '?')}"
