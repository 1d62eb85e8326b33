"""The figures of a run, written to the terminal, a JSONL file, and TensorBoard if tensorboardX is installed.

A file in a bucket is written every `PUT_EVERY` seconds, and before each checkpoint is saved. A kill loses the lines since then; the
next start computes their steps again.
"""

import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from metaembed_jax import files
from metaembed_jax.errors import UserError

PUT_EVERY = 30.0  # seconds between writes of the file in a bucket


class MetricsWriter:
    """Writes one line a step to metrics.jsonl, and shows the latest figures in a progress bar.

    Args:
      workdir: the folder of the run.
      first_step: lines of later steps are removed from the file, since these steps are written again.
      steps: number of steps of the whole run, for the bar.
      silent: write and show nothing; true on all hosts but the first.

    Raises:
      UserError: the file cannot be written, here and in `write`.
    """

    def __init__(self, workdir: Path, first_step: int, steps: int, silent: bool = False):
        self._path, self._silent = workdir / "metrics.jsonl", silent
        if not silent:
            with _writing(self._path):
                self._lines = _lines(self._path, _kept(self._path, first_step))
        every = 0.2 if sys.stderr.isatty() else 30  # seconds; a log file should have few lines
        self._bar = tqdm(
            total=steps,
            initial=first_step,
            desc=workdir.name,
            unit="step",
            dynamic_ncols=True,
            mininterval=every,
            disable=silent,
        )
        has_board = importlib.util.find_spec("tensorboardX") is not None and not silent
        self._board = _TensorBoard(workdir / "tensorboard", first_step) if has_board else None

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Write a line for `step`."""
        if not self._silent:
            with _writing(self._path):
                self._lines.write(f"{json.dumps({'step': step, **figures})}\n".encode())
        if self._board is not None:
            self._board.write(step, figures)

    def flush(self) -> None:
        """Write what is held back for a bucket."""
        if not self._silent:
            self._lines.flush()
        if self._board is not None:
            self._board.flush()

    def show(self, **figures: float) -> None:
        """Show figures next to the bar."""
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in figures.items()}, refresh=False)

    def advance(self) -> None:
        """Advance the bar by a step."""
        self._bar.update()

    def unpause(self) -> None:
        """Leave the time since the last step out of the bar's estimate."""
        self._bar.unpause()

    def print(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.write(line)

    def close(self) -> None:
        """Flush and close all files."""
        self._bar.close()
        self.flush()
        if not self._silent:
            self._lines.close()
        if self._board is not None:
            self._board.close()


class _TensorBoard:
    """Event files of TensorBoard, without those of steps after `first_step`, which are written again."""

    def __init__(self, folder: Path, first_step: int):
        import tensorboardX  # pyright: ignore[reportMissingImports]  # optional, and not a development requirement

        self._uploads = files.Uploads(folder)
        self._writer = tensorboardX.SummaryWriter(str(self._uploads.folder), purge_step=first_step)

    def write(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()
        self._uploads.send()

    def close(self) -> None:
        self._writer.close()
        self._uploads.close()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); repair it and run the same command again") from error


def _kept(path: Path, last_step: int) -> bytes:
    """Return the lines of steps up to `last_step`, without a line that a kill cut short."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            if json.loads(line)["step"] > last_step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line)
    return b"".join(kept)


def _lines(path: Path, content: bytes) -> "BinaryIO | _BucketLines":
    """Open a file of this content to add lines to; on a disk each line is written at once."""
    if files.is_bucket(path):
        return _BucketLines(path, content)
    files.write_bytes(path, content)
    return path.open("ab", buffering=0)


class _BucketLines:
    """A file in a bucket. It cannot be appended to, so all of it is written again, at most every `PUT_EVERY` seconds."""

    def __init__(self, path: Path, content: bytes):
        self._path, self._content, self._last, self._sent = path, bytearray(content), time.monotonic(), False

    def write(self, line: bytes) -> None:
        self._content += line
        self._sent = False
        if time.monotonic() > self._last + PUT_EVERY:
            self.flush()

    def flush(self) -> None:
        if not self._sent:
            files.write_bytes(self._path, bytes(self._content))
            self._last, self._sent = time.monotonic(), True

    def close(self) -> None:
        self.flush()
