"""The commands of docs/tpu.md, run as written, except those that are marked."""

import os
import re
import subprocess
import sys

import pytest

from tests.files.emulator import BUCKET
from tests.several_hosts import ROOT

PAGE = (ROOT / "docs" / "tpu.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS if not block.startswith("# not run here\n") for line in block.splitlines()]


def test_what_needs_a_slice_says_so():
    assert len(COMMANDS) >= 6 and all(command.startswith("python ") for command in COMMANDS)
    assert PAGE.count("```") == 2 * len(BLOCKS)


@pytest.mark.slow
def test_the_others_run(bucket, data_dir, tmp_path):
    """They run with a bucket of the emulator, and a small config whose data is prepared."""
    config = tmp_path / "config.py"
    config.write_text(
        "from metaembed_jax.config import load_config\n"
        "def get_config(arg=None):\n"
        f"    return load_config({str(ROOT / 'tests/training/small.py')!r}, {{'data.dir': {str(data_dir)!r}}})\n"
    )
    variables = bucket | {
        "CONFIG": str(config),
        "RUN": f"{BUCKET}/docs",
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1"),
    }
    for name in ("train.py", "eval.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    for command in COMMANDS:
        process = subprocess.run(command, shell=True, cwd=tmp_path, env=os.environ | variables, capture_output=True)
        assert process.returncode == 0, (command, process.stderr.decode()[-2000:])
    assert (tmp_path / "exported" / "README.md").is_file() and not (tmp_path / "gs:").exists()
