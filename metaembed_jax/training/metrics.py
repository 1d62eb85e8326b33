"""Where the figures of a run go: the terminal, a JSONL file, and TensorBoard where tensorboardX is installed.

In a bucket the file is written every `PUT_EVERY` seconds, and before each checkpoint is saved. A kill loses the lines in between,
which are of steps that the next start computes again.
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
        self._path, self._silent = workdir / "metrics.jsonl", silent
        if not silent:
            with _writing(self._path):
                self._lines = _lines(self._path, _kept(self._path, first_step))
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
        self._board = self._uploads = None
        if importlib.util.find_spec("tensorboardX") and not silent:
            import tensorboardX

            self._uploads = files.Uploads(workdir / "tensorboard")
            self._board = tensorboardX.SummaryWriter(str(self._uploads.folder), purge_step=first_step)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Adds a line for `step`."""
        if not self._silent:
            with _writing(self._path):
                self._lines.write(f"{json.dumps({'step': step, **figures})}\n".encode())
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Writes what is held back for a bucket."""
        if not self._silent:
            self._lines.flush()
        if self._board is not None:
            self._board.flush()
            self._uploads.send()

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
        self.flush()
        if not self._silent:
            self._lines.close()
        if self._board is not None:
            self._board.close()
            self._uploads.close()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); put that right, and the same command goes on") from error


def _kept(path: Path, last_step: int) -> bytes:
    """The lines of steps up to `last_step`; a line cut short by a kill goes too."""
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
    """A file to add lines to, which holds `content`; on a disk each line is written at once."""
    if files.is_bucket(path):
        return _BucketLines(path, content)
    files.write_bytes(path, content)
    return path.open("ab", buffering=0)


class _BucketLines:
    """A file in a bucket, which cannot be appended to: all of it is put again, at most every `PUT_EVERY` seconds."""

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
