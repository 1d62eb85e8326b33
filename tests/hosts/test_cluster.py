"""The cluster that a process is part of, from variables, device files and the metadata server."""

import http.server
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from metaembed_jax.config import config_names
from metaembed_jax.errors import UserError
from metaembed_jax.hosts import connect
from metaembed_jax.hosts.cluster import Cluster, find_cluster
from metaembed_jax.hosts.connect import connect_hosts
from tests.several_hosts import ROOT, free_port

KAGGLE = {"TPU_PROCESS_ADDRESSES": "local", "TPU_WORKER_HOSTNAMES": "localhost"}
SLURM = {
    "SLURM_JOB_ID": "4096",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
GKE = {"TPU_WORKER_HOSTNAMES": "w-0.svc,w-1.svc,w-2.svc,w-3.svc", "TPU_WORKER_ID": "2"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "first.svc:8080"}
MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
PORT = "node07:61440"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A machine with four TPU chips and two NVIDIA cards, no variables of a cluster, and no metadata server."""
    for key in os.environ:
        if key.startswith(("TPU_", "JAX_", "SLURM_", "OMPI_", "MEGASCALE_")):
            monkeypatch.delenv(key)
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{free_port()}")
    (tmp_path / "dev").mkdir()
    for name in ("accel0", "accel1", "accel2", "accel3", "nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / "dev" / name).touch()
    return tmp_path


@pytest.fixture
def metadata(root, monkeypatch):
    """The attributes that a local copy of Google's metadata server serves, to be filled."""
    attributes = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            text = attributes.get(self.path.rpartition("/")[2])
            self.send_response(404 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "not here").encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_address[1]}")
    yield attributes
    server.shutdown()


@pytest.mark.parametrize(
    "environment, cluster",
    [
        ({}, None),
        (KAGGLE, None),
        ({"TPU_SKIP_MDS_QUERY": "1"}, None),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_JOB_ID": "4096", "SLURM_NTASKS": "2"}, None),  # sbatch without srun
        (SLURM, Cluster("Slurm", PORT, 2, 1, [0])),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2"}, Cluster("Slurm", PORT, 2, 1)),
        (MPI, Cluster("Open MPI", "10.96.0.1:62624", 2, 1, [0])),
        (GKE, Cluster("TPU slice", "w-0.svc:8482", 4, 2)),
        (GKE | {"JAX_COORDINATOR_PORT": "99"}, Cluster("TPU slice", "w-0.svc:99", 4, 2)),
        (GKE | SLICES, Cluster("2 TPU slices", "first.svc:8482", 8, 6)),
        (KAGGLE | SLICES, Cluster("2 TPU slices", "first.svc:8482", 2, 1)),
        (GKE | {"JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_cluster_by_variables(environment, cluster, root, monkeypatch):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert find_cluster(root) == cluster


def test_a_machine_without_chips_does_not_ask_the_server(tmp_path, metadata):
    metadata |= {"agent-worker-number": "1", "worker-network-endpoints": "10.0.0.1,10.0.0.2"}
    assert find_cluster(tmp_path / "elsewhere") is None


def test_cluster_by_the_metadata_server(root, metadata):
    assert find_cluster(root) is None
    metadata["agent-worker-number"] = "1"
    metadata["worker-network-endpoints"] = "t:1:10.0.0.1,t:2:10.0.0.2"
    assert find_cluster(root) == Cluster("TPU slice", "10.0.0.1:8482", 2, 1)
    metadata["tpu-env"] = (
        "ZONE: 'a'\nMEGASCALE_NUM_SLICES: '3'\nMEGASCALE_SLICE_ID: '2'\nMEGASCALE_COORDINATOR_ADDRESS: '10.9.0.1'\n"
    )
    assert find_cluster(root) == Cluster("3 TPU slices", "10.9.0.1:8482", 6, 5)
    metadata["worker-network-endpoints"] = "10.0.0.1"
    metadata["agent-worker-number"], metadata["tpu-env"] = "0", "ZONE: 'a'\n"
    assert find_cluster(root) is None


def test_malformed_variables(root, monkeypatch):
    for key, value in (SLURM | {"SLURM_NTASKS": "two"}).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match="ValueError: invalid literal .*--coordinator"):
        find_cluster(root)


def test_a_coordinator_that_does_not_answer_is_one_line(monkeypatch):
    assert connect.COORDINATOR_SECONDS + 5 < 60  # seconds, with the last attempt
    monkeypatch.setattr(connect, "COORDINATOR_SECONDS", 0.1)
    port = free_port()
    with pytest.raises(
        UserError, match=rf"host 1 of 2 .*: the first host does not answer at localhost:{port} \(Connection refused\)"
    ):
        connect_hosts(f"localhost:{port}", 2, 1)


@pytest.mark.parametrize("coordinator, host", [("localhost", 0), (":80", 0), ("h:0", 0), ("h:65536", 1), ("h:80", 2)])
def test_a_coordinator_that_can_be_none(coordinator, host):
    with pytest.raises(UserError, match=f"--coordinator={coordinator} --hosts=2 --host={host}: expected ADDRESS:PORT, a port"):
        connect_hosts(coordinator, 2, host)


def test_variables_of_no_host(root, monkeypatch):
    for key, value in (SLURM | {"JAX_COORDINATOR_PORT": "first"}).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=r"node07:first .*by the variables of Slurm"):
        connect_hosts(None, None, None)


def test_a_port_that_another_program_has():
    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"host 0 of 2 .*cannot listen on port {port} .Address already in use."):
            connect_hosts(f"localhost:{port}", 2, 0)


def test_hosts_that_do_not_come_are_one_line():
    program = f"connect.START_SECONDS = 1; connect.connect_hosts('localhost:{free_port()}', 2, 0)"
    command = [sys.executable, "-c", f"from metaembed_jax.hosts import connect; {program}"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (process.returncode, len(process.stderr.splitlines())) == (2, 2)
    assert "error: host 0 of 2 (--hosts): not all hosts came to localhost:" in process.stderr


@pytest.mark.parametrize("program", [["train.py"], ["eval.py", "--checkpoint=nowhere"]])
def test_kaggle_reaches_its_config(program):
    """JAX_FORCE_TPU_INIT stands in for the chips. Without a metadata server, JAX's own detection ends in a ConnectionError."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("TPU_", "JAX_PLATFORMS"))}
    environment |= KAGGLE | {"JAX_FORCE_TPU_INIT": "1", "GCE_METADATA_IP": f"127.0.0.1:{free_port()}"}
    command = [sys.executable, *program, "--config=configs/missing.py"]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stderr.splitlines()[-1]) == (
        2,
        f"error: configs/missing.py: no such file or config; expected {', '.join(config_names())}, or a file "
        f"({ROOT / 'configs' / 'missing.py'} does not exist)",
    )
    assert "Traceback" not in process.stderr and not Path("nowhere").exists()
