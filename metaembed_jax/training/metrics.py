"""Where the figures of a run go: the terminal, a JSONL file, and TensorBoard where tensorboardX is installed."""

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from metaembed_jax.errors import UserError


class MetricsWriter:
    """Writes one line a step to metrics.jsonl, and shows the latest in a progress bar.

    Args:
      workdir: the folder of the run.
      first_step: steps after it are written anew, so what the file has of them is dropped.
      steps: of the whole run, for the bar.
      silent: write and show nothing, as all hosts but the first.

    Raises:
      UserError: the file cannot be written, here and in `write`.
    """

    def __init__(self, workdir: Path, first_step: int, steps: int, silent: bool = False):
        self._path = Path(os.devnull) if silent else workdir / "metrics.jsonl"
        with _writing(self._path):
            if not silent:
                _truncate(self._path, first_step)
            self._file = self._path.open("ab", buffering=0)
        every = 0.2 if sys.stderr.isatty() else 30  # seconds; a log file wants few lines
        self._bar = tqdm(
            total=steps,
            initial=first_step,
            desc=workdir.name,
            unit="step",
            dynamic_ncols=True,
            mininterval=every,
            disable=silent,
        )
        self._board = None
        if importlib.util.find_spec("tensorboardX") and not silent:
            import tensorboardX

            self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Adds a line for `step`."""
        with _writing(self._path):
            self._file.write(f"{json.dumps({'step': step, **figures})}\n".encode())
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)

    def show(self, **figures: float) -> None:
        """Puts figures beside the bar."""
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in figures.items()}, refresh=False)

    def advance(self) -> None:
        """One more step is done."""
        self._bar.update()

    def unpause(self) -> None:
        """Leaves the time since the last step out of the time that the bar expects."""
        self._bar.unpause()

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._bar.write(line)

    def close(self) -> None:
        """Flushes everything."""
        self._bar.close()
        self._file.close()
        if self._board is not None:
            self._board.close()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); put that right, and the same command goes on") from error


def _truncate(path: Path, last_step: int) -> None:
    """Keeps the lines of steps up to `last_step`; a line cut short by a kill goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] > last_step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line + "\n")
    temporary = path.with_name("metrics.jsonl.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
