"""Chips that JAX does not see, and the first line of a run."""

import os
import subprocess
import sys

import jax
import pytest

from metaembed_jax import devices
from metaembed_jax.devices import check_devices, describe_devices, nvidia_files, tpu_files
from metaembed_jax.errors import UserError
from metaembed_jax.mesh import make_mesh
from tests.several_hosts import ROOT


def machine(root, files=(), pci=()):
    """Make the device files of a machine in a folder; return the folder."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    for number, (vendor, device) in enumerate(pci):
        folder = root / f"sys/bus/pci/devices/0000:00:0{number}.0"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "device").write_text(device + "\n")
    return root


@pytest.fixture
def undecided():
    """JAX without JAX_PLATFORMS."""
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    yield
    jax.config.update("jax_platforms", before)


@pytest.mark.parametrize(
    "files, pci, line",
    [
        (["dev/accel0", "dev/accel1"], [], r"has 2 TPU devices \(.*accel0\), and JAX sees only the CPU: pip install -e '.\[tpu\]'"),
        (["dev/vfio/0"], [("0x1ae0", "0x0042"), ("0x1ae0", "0x006f")], r"has 1 TPU device \(.*00:01.0\).*--cpu"),
        (["dev/nvidia0", "dev/nvidiactl"], [], r"has 1 NVIDIA device .*pip install -e '.\[cuda\]'"),
        (["dev/dxg"], [], "has 1 NVIDIA device"),
    ],
)
def test_chips_that_jax_does_not_see(tmp_path, undecided, files, pci, line):
    with pytest.raises(UserError, match=line):
        check_devices({}, machine(tmp_path, files, pci))


def test_a_user_may_ask_for_the_cpu(tmp_path):
    assert jax.config.jax_platforms == "cpu"
    check_devices({}, machine(tmp_path, ["dev/accel0", "dev/nvidia0"]))


def test_a_user_may_hide_the_cards(tmp_path, undecided):
    check_devices({"CUDA_VISIBLE_DEVICES": ""}, machine(tmp_path, ["dev/nvidia0"]))


def test_other_device_files_are_not_chips(tmp_path, undecided):
    root = machine(tmp_path, ["dev/accel/accel0", "dev/vfio/vfio", "dev/nvidiactl"], [("0x1ae0", "0x0042"), ("0x8086", "0x006f")])
    assert tpu_files(root) == nvidia_files(root) == []
    check_devices({}, root)


def test_first_line():
    line = describe_devices(make_mesh(data=4, fsdp=2))
    cores = os.cpu_count()
    assert line.startswith(
        f"8 x CPU devices, {cores} cores on 1 host; mesh: data 4, fsdp 2, tensor 1; jax {jax.__version__}, jaxlib "
    )


def test_a_platform_that_does_not_start_is_one_line():
    """JAX_PLATFORMS asks for a GPU that does not exist; `--cpu` takes precedence."""
    command = [sys.executable, "train.py", "--config=tests/training/small.py", "--workdir=nowhere"]
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert process.stderr.splitlines()[-1].startswith("error: JAX does not start cuda: ")
    forced = subprocess.run([*command, "--cpu", "--config.seed=x"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "config.seed='x': expected a non-negative integer" in forced.stderr


def test_train_names_the_install_line(tmp_path):
    """The install line is that of a TPU VM without libtpu."""
    root = machine(tmp_path, ["dev/accel0"])
    lines = [
        "import runpy, sys, pathlib",
        "from metaembed_jax import devices",
        "check = devices.check_devices",
        f"devices.check_devices = lambda: check({{}}, pathlib.Path({str(root)!r}))",
        "sys.argv = ['train.py', '--config=tests/training/small.py', '--workdir=nowhere']",
        "runpy.run_path('train.py', run_name='__main__')",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
    process = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 2 and devices.INSTALL["TPU"] in process.stderr.splitlines()[-1], process.stderr
