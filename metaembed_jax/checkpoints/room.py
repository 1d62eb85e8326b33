"""The room that the checkpoints of a run take on its disk."""

import shutil
from pathlib import Path
from typing import Any

import jax

from metaembed_jax import files
from metaembed_jax.errors import UserError


def check_room(workdir: Path, saved: Any, keep: int, steps: int) -> None:
    """Check that the checkpoints of a run fit on its disk; do nothing for a bucket.

    At most these are on the disk at once: the latest `keep`, the best, and the one that is being written.

    Args:
      workdir: the folder of the run; checkpoints that it has already are counted as room.
      saved: the arrays of a checkpoint, as shapes and dtypes.
      keep: `config.schedule.keep_checkpoints`.
      steps: `config.schedule.steps`.

    Raises:
      UserError: they do not fit; names the sizes.
    """
    if files.is_bucket(workdir):
        return
    usage = shutil.disk_usage(files.existing_parent(workdir))
    size, most = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved)), min(keep + 2, steps)
    stored = sum(path.stat().st_size for path in (workdir / "checkpoints").rglob("*") if path.is_file())
    if usage.total and most * size > usage.free + stored:  # some network file systems do not know their size
        gigabytes = f"{size / 1e9:.3g} GB each, and its disk has {usage.free / 1e9:.3g} GB free"
        raise UserError(
            f"{workdir}: up to {most} checkpoints are on the disk at once, {gigabytes}: free space, lower "
            f"config.schedule.keep_checkpoints={keep}, or choose another --workdir"
        )
