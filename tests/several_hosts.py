"""Several processes on one machine that are several hosts, with real collectives."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


class Hosts:
    """One command on so many processes, with eight devices in all; reaped at the end whatever happens."""

    def __init__(self, count, command, flags_of_host=lambda host: []):
        port = free_port()
        environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", f"count={8 // count}")}
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
        """Ends all at once; what each had printed, but for what the collectives print of themselves."""
        for process in self.processes:
            process.kill()
        return [printed(process.communicate()[0]) for process in self.processes]

    def wait(self, code=0):
        """(stdout, stderr) of each, all of which exit with `code`."""
        said = [process.communicate(timeout=300) for process in self.processes]
        codes = [process.returncode for process in self.processes]
        assert codes == [code] * len(codes), (codes, said)
        return [(printed(out), errors) for out, errors in said]


def printed(out):
    """Without what the collectives say, whose threads may write into each other's lines."""
    kept = (line for line in out.splitlines(keepends=True) if "Gloo" not in line and "peer ranks" not in line)
    return "".join(line for line in kept if line.strip())
