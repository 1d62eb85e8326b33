"""The chips of this machine, and the devices that JAX runs on."""

import importlib.metadata
import os
from collections.abc import Mapping, Sized
from pathlib import Path

import jax
from jax.sharding import Mesh

from metaembed_jax.errors import UserError

GOOGLE = "0x1ae0"  # PCI vendor, also of network cards: the PCI device must be one of the TPUs below
TPUS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}  # v2 and v3, v4i, v4, v5p, v5e, v6e, 7x
INSTALL = {"TPU": "pip install -e '.[tpu]'", "NVIDIA": "pip install -e '.[cuda]'"}
PLUGINS = ("libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")


def tpu_files(root: Path = Path("/")) -> list[str]:
    """Return the device files or PCI addresses of the TPU chips of this machine."""
    files = [str(file) for file in sorted(root.glob("dev/accel[0-9]*"))]  # v2 to v4; later ones use /dev/vfio, like other devices
    return files or [str(folder) for folder in sorted(root.glob("sys/bus/pci/devices/*")) if _is_tpu(folder)]


def nvidia_files(root: Path = Path("/")) -> list[str]:
    """Return the device files of the NVIDIA cards of this machine; on WSL, /dev/dxg."""
    return [str(file) for pattern in ("dev/nvidia[0-9]*", "dev/dxg") for file in sorted(root.glob(pattern))]


def _is_tpu(folder: Path) -> bool:
    try:
        return (folder / "vendor").read_text().strip() == GOOGLE and (folder / "device").read_text().strip() in TPUS
    except OSError:
        return False


def use_cpu() -> None:
    """Run this process on the CPU. Must be called before JAX starts its devices."""
    jax.config.update("jax_platforms", "cpu")


def check_devices(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> None:
    """Check that JAX sees the chips of this machine, unless the user chose the CPU.

    Args:
      environment: may hide the cards on purpose, by CUDA_VISIBLE_DEVICES.
      root: the folder of the device files; `/` except in tests.

    Raises:
      UserError: JAX has no plugin for the chips (names them and the installation command), or a platform does not start.
    """
    try:
        platform = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # AssertionError: JAX_PLATFORMS names a plugin that is not installed
        reason = (str(error).strip() or "no plugin of this name is installed").splitlines()[0]
        platforms = _platforms() or "any platform"
        raise UserError(f"JAX does not start {platforms}: {reason}; to run on the CPU, add --cpu") from error
    if platform != "cpu" or _platforms().split(",")[0] == "cpu":
        return
    hidden = environment.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles")
    for kind, files in (("TPU", tpu_files(root)), ("NVIDIA", [] if hidden else nvidia_files(root))):
        if files:
            raise UserError(
                f"this machine has {len(files)} {kind} {_plural('device', files)} ({files[0]}), and JAX sees only the CPU: "
                f"{INSTALL[kind]}, or run on the CPU with --cpu (or JAX_PLATFORMS=cpu)"
            )


def device_memory() -> int | None:
    """Return the bytes that a program may use on a device; None if the devices are CPUs, which share the machine's memory."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def free_memory(mesh: Mesh) -> int:
    """Return the bytes that are free on a device of a mesh, on this host. CPUs share the machine's memory."""
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    stats = [device.memory_stats() or {} for device in devices]
    if all("bytes_limit" in memory for memory in stats):
        return min(memory["bytes_limit"] - memory.get("bytes_in_use", 0) for memory in stats)
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):  # not Linux
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return free // len(devices)


def describe_devices(mesh: Mesh, weights: int | None = None) -> str:
    """Return the first line of a run: its devices, hosts and mesh, and the versions of JAX and its plugins.

    Args:
      weights: bytes of the weights on a device, to name them too.
    """
    devices = list(mesh.devices.flat)
    kind, hosts = devices[0].device_kind, {device.process_index for device in devices}
    if devices[0].platform == "cpu":
        kind = f"CPU {_plural('device', devices)}, {os.cpu_count()} cores"
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    axes += "" if weights is None else f", {weights / 2**30:.1f} GiB of weights on each device"
    versions = [f"{name} {version}" for name in ("jax", "jaxlib", *PLUGINS) if (version := _version(name))]
    return f"{len(devices)} x {kind} on {len(hosts)} {_plural('host', hosts)}; mesh: {axes}; {', '.join(versions)}"


def _platforms() -> str:
    """Return the platforms of JAX_PLATFORMS."""
    return jax.config.jax_platforms or ""  # pyright: ignore[reportAttributeAccessIssue]  JAX adds its flags at run time


def _plural(name: str, items: Sized) -> str:
    return name if len(items) == 1 else f"{name}s"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
