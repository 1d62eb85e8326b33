"""The quickstart notebook runs top to bottom."""

import os
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import nbformat
import pytest

nbclient = pytest.importorskip("nbclient")
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"
SHRUNKEN = "--config.init_from= --config.schedule.steps=12 --config.optimizer.warmup_steps=2 --config.evaluation.validate_every=12 "
SHRUNKEN += "--config.schedule.save_every=12 --config.rows.batch_size=16 --config.rows.unroll_layers=1"


def test_quickstart(tmp_path, monkeypatch, data_dir):
    monkeypatch.setenv("QUICKSTART_TRAIN_FLAGS", f"{SHRUNKEN} --config.data.dir={data_dir}")
    monkeypatch.setenv("QUICKSTART_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("QUICKSTART_DATA", str(data_dir))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("count=8", "count=1"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    client = nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(NOTEBOOK.parents[1])}})
    client.execute()
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert len(pictures) == 3, "the plot and two searches"


@pytest.mark.parametrize(
    "device, project",
    [
        ("/dev/accel0", ".[train,tpu]"),
        ("/dev/vfio/0", ".[train,tpu]"),
        ("/dev/nvidia0", ".[train,cuda]"),
        ("/dev/null", ".[train]"),
    ],
)
def test_first_cell_installs_what_drives_the_chips(device, project, tmp_path, monkeypatch):
    commands = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.run", lambda command, check: (commands.append(command), Path(command[-1]).mkdir(exist_ok=True)))
    monkeypatch.setattr("glob.glob", lambda pattern: [device] if fnmatchcase(device, pattern) else [])
    monkeypatch.setattr("sys.path", list(sys.path))
    cell = next(cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code")
    exec(cell.source.replace('REPOSITORY = ""', 'REPOSITORY = "somewhere"'), {})
    assert [command[-1] for command in commands] == ["metaembed_jax_checkout", project]
