"""Setup of the commands that compute: devices, other hosts, compiled programs."""

import argparse

from metaembed_jax.compilation import keep_no_programs, keep_programs
from metaembed_jax.devices import use_cpu
from metaembed_jax.hosts.connect import connect_hosts
from metaembed_jax.inputs.image_flags import limit_images

MESH_FLAGS = {
    "data": "devices that encode different items",
    "fsdp": "devices that also share the weights",
    "tensor": "devices that share each layer's work",
    "slices": "TPU slices (default: all that there are)",
}


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `start` reads."""
    flags = parser.add_argument_group("devices")
    flags.add_argument("--cpu", action="store_true", help="run on the CPU, even on a machine with chips")
    flags.add_argument("--no-compile-cache", action="store_true", help="keep no compiled programs in ~/.cache/metaembed_jax")


def add_host_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `connect_hosts`, for hosts without a cluster environment."""
    flags = parser.add_argument_group(
        "several hosts", "found automatically on a TPU slice or under Slurm; elsewhere, on each host:"
    )
    flags.add_argument("--coordinator", metavar="ADDRESS:PORT", help="of the first host")
    flags.add_argument("--hosts", type=int, help="the number of hosts")
    flags.add_argument("--host", type=int, help="the number of this host, from 0")


def add_mesh_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `mesh_sizes` reads."""
    flags = parser.add_argument_group(
        "mesh", "sizes of its axes; -1: all remaining devices (default: data, with the smallest fsdp at which the weights fit)"
    )
    for axis, meaning in MESH_FLAGS.items():
        flags.add_argument(f"--mesh.{axis}", dest=f"mesh_{axis}", metavar="N", type=int, help=meaning)


def mesh_sizes(arguments: argparse.Namespace) -> dict[str, int]:
    """Return the sizes that the flags of `add_mesh_flags` give, by axis."""
    flags = {axis: getattr(arguments, f"mesh_{axis}") for axis in MESH_FLAGS}
    return {axis: size for axis, size in flags.items() if size is not None}


def start(arguments: argparse.Namespace) -> None:
    """Set up JAX by the flags of `add_device_flags`.

    Also limit images and join the other hosts, if the command has `add_image_flag` and `add_host_flags`.

    Raises:
      UserError: as `connect_hosts`.
    """
    if "image_mib" in arguments:
        limit_images(arguments)
    if arguments.cpu:
        use_cpu()
    if arguments.no_compile_cache:
        keep_no_programs()
    keep_programs()
    if "coordinator" in arguments:
        connect_hosts(arguments.coordinator, arguments.hosts, arguments.host)
