"""Several processes of one machine as several hosts, with real collectives."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Hosts:
    """Processes that run one command, with eight devices in all; they end with the block."""

    def __init__(self, count, command, flags_of_host=lambda host: [], devices=8):
        port = free_port()
        environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", f"count={devices // count}")}
        self.processes = []
        for host in range(count):
            joined = [f"--coordinator=localhost:{port}", f"--hosts={count}", f"--host={host}"] if count > 1 else []
            flags = [sys.executable, *command, *joined, *flags_of_host(host)]
            pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            self.processes.append(subprocess.Popen(flags, cwd=ROOT, env=environment, **pipes))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        """End all; return the stdout of each, without lines of the collectives."""
        for process in self.processes:
            process.kill()
        return [printed(process.communicate()[0]) for process in self.processes]

    def wait(self, code=0):
        """Wait until all exit with `code`; return (stdout, stderr) of each."""
        outputs = [process.communicate(timeout=300) for process in self.processes]
        codes = [process.returncode for process in self.processes]
        assert codes == [code] * len(codes), (codes, outputs)
        return [(printed(out), errors) for out, errors in outputs]


def printed(out):
    """Return lines without those of the collectives, whose threads may write into each other's lines."""
    kept = (line for line in out.splitlines(keepends=True) if "Gloo" not in line and "peer ranks" not in line)
    return "".join(line for line in kept if line.strip())
