"""The row plan in a run's folder. A run that resumes reads it, instead of packing all its steps again."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np

from metaembed_jax.batch.items import Size
from metaembed_jax.config.record import fixed
from metaembed_jax.config.run import RunConfig
from metaembed_jax.data.row_plan import RowPlan, plan_rows
from metaembed_jax.data.run_items import RunItems
from metaembed_jax.errors import UserError
from metaembed_jax.files import read_json, write_json
from metaembed_jax.network_config import row_limits

NAME = "rows.json"
DIGEST_STEPS = 8  # their sizes are in the digest, for sources without a table, and for changes of the code


def stored_plan(items: RunItems, config: RunConfig, workdir: Path, silent: bool = True) -> RowPlan:
    """Return the row plan in the folder of a run. If it is missing, damaged or of other items, it is made and written.

    Args:
      silent: show no progress bar.

    Raises:
      UserError: it cannot be written.
    """
    file, digits = workdir / NAME, plan_digest(items, config)
    plan = _read(file, digits)
    if plan is None:
        plan = plan_rows(items, row_limits(config), silent)
        write_json(file, {"digest": digits, "plan": dataclasses.asdict(plan)})
    return plan


def plan_digest(items: RunItems, config: RunConfig) -> str:
    """Return a digest of all that a plan depends on: the keys that a run keeps, its steps, and the sizes of its items."""
    kept = {**fixed(config), "schedule.steps": config.schedule.steps}
    hashed = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for source, sizes in zip(items.sources, items.sizes, strict=True):
        hashed.update(f"{len(source)}".encode())
        if sizes.table is not None:
            hashed.update(np.ascontiguousarray(sizes.table).data)
    for step in np.linspace(0, len(items) - 1, min(len(items), DIGEST_STEPS)).astype(int).tolist():
        hashed.update(np.ascontiguousarray(items[step].sizes_N3).data)
    return hashed.hexdigest()[:16]


def _read(file: Path, digits: str) -> RowPlan | None:
    try:
        content = read_json(file)
        if content["digest"] != digits:
            return None
        plan = content["plan"]
        return RowPlan(**plan | {"row": Size(*map(int, plan["row"]))})
    except (UserError, KeyError, TypeError, ValueError):
        return None
