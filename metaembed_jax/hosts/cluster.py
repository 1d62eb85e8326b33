"""Find the hosts of a run in the machine's environment, before JAX initializes.

`jax.distributed.initialize()` detects clusters too, but it asks Google's metadata server wherever there is a TPU, and fails where
no server answers (Kaggle, Colab, containers): jax-ml/jax#40854. It also gives each Slurm task a single GPU.
"""

import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jax._src.clusters import OmpiCluster, SlurmCluster  # the parsers of node lists have no public name

from metaembed_jax.devices import nvidia_files, tpu_files
from metaembed_jax.errors import UserError

TPU_PORT = 8482  # JAX's own choice; libtpu uses 8476
METADATA_SECONDS = 3  # the server is on the machine's own network: it answers in milliseconds or does not exist
SLURM_KEYS = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
TPU_LISTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")  # the hosts of a slice; Kaggle has "local" and "localhost" here


class Cluster(NamedTuple):
    """Several hosts that run one program.

    Attributes:
      kind: the source of the figures, such as Slurm; for messages.
      coordinator: ADDRESS:PORT of the first host.
      hosts: the number of hosts.
      host: the number of this host, from 0.
      local_devices: the GPUs of this machine that this process uses; None for all.
    """

    kind: str
    coordinator: str
    hosts: int
    host: int
    local_devices: list[int] | None = None


def find_cluster(root: Path = Path("/")) -> Cluster | None:
    """Return the cluster that this process is part of (Slurm, Open MPI, GKE or TPU VMs); None if it runs alone.

    Args:
      root: the folder of the device files; `/` except in tests.

    Raises:
      UserError: malformed variables.
    """
    try:
        cluster = _slurm(os.environ, root) or _open_mpi(os.environ) or _tpu(os.environ, root)
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"malformed environment variables of a cluster ({type(error).__name__}: {error}); "
            "add --coordinator, --hosts and --host, or unset the variables to run on this host alone"
        ) from error
    return cluster if cluster and cluster.hosts > 1 else None


def _slurm(environment: Mapping[str, str], root: Path) -> Cluster | None:
    if not all(key in environment for key in SLURM_KEYS):  # a shell of sbatch or salloc without srun is one process
        return None
    hosts, local = int(environment["SLURM_NTASKS"]), int(environment["SLURM_LOCALID"])
    coordinator = SlurmCluster.get_coordinator_address(None, environment.get("JAX_COORDINATOR_PORT"))
    is_task_a_node = hosts == int(environment.get("SLURM_STEP_NUM_NODES", 0))
    gpus = len(nvidia_files(root))
    devices = None if is_task_a_node or not gpus else [local]
    return Cluster("Slurm", coordinator, hosts, int(environment["SLURM_PROCID"]), devices)


def _open_mpi(environment: Mapping[str, str]) -> Cluster | None:
    if "OMPI_MCA_orte_hnp_uri" not in environment:
        return None
    coordinator = OmpiCluster.get_coordinator_address(None, environment.get("JAX_COORDINATOR_PORT"))
    hosts, host, local = (int(environment[f"OMPI_COMM_WORLD_{key}"]) for key in ("SIZE", "RANK", "LOCAL_RANK"))
    return Cluster("Open MPI", coordinator, hosts, host, [local])


def _tpu(environment: Mapping[str, str], root: Path) -> Cluster | None:
    """Return the hosts of a TPU job, of one slice or several."""
    if not tpu_files(root) or environment.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return None
    hostnames = next((environment[key] for key in TPU_LISTS if environment.get(key)), None)
    if hostnames is not None:
        workers, worker, variables = hostnames.split(","), environment.get("TPU_WORKER_ID", "0"), environment
    elif "TPU_SKIP_MDS_QUERY" in environment or (worker := _metadata("agent-worker-number", environment)) is None:
        return None
    else:
        workers = (_metadata("worker-network-endpoints", environment) or "localhost").split(",")
        tpu_env = re.findall(r"^(\w+): '?([^'\n]*)'?$", _metadata("tpu-env", environment) or "", re.MULTILINE)
        variables = {**dict(tpu_env), **environment}
    slices = int(variables.get("MEGASCALE_NUM_SLICES") or 1)
    # An entry is an address, address:port, or name:id:address.
    addresses = [entry.split(":")[2 if entry.count(":") == 2 else 0] for entry in workers]
    coordinator = (variables.get("MEGASCALE_COORDINATOR_ADDRESS") or addresses[0]).split(":")[0]
    port = environment.get("JAX_COORDINATOR_PORT", TPU_PORT)
    host = int(worker) + int(variables.get("MEGASCALE_SLICE_ID") or 0) * len(addresses)
    kind = "TPU slice" if slices == 1 else f"{slices} TPU slices"
    return Cluster(kind, f"{coordinator}:{port}", slices * len(addresses), host)


def _metadata(key: str, environment: Mapping[str, str]) -> str | None:
    """Return an attribute of this machine from Google's metadata server; None if the server or the attribute does not exist."""
    server = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(f"http://{server}/computeMetadata/v1/instance/attributes/{key}")
    request.add_header("Metadata-Flavor", "Google")
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=METADATA_SECONDS) as response:
            return response.read(2**20).decode()
    except (urllib.error.URLError, OSError, ValueError):
        return None
