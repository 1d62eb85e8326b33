"""The mesh, microbatch and recomputation that train fastest on a slice. Only the most promising are compiled: it takes minutes."""

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

from tqdm import tqdm

from metaembed_jax.backbones.family import family
from metaembed_jax.backbones.flop_counts import FlopCount
from metaembed_jax.batch.training import StepShape, step_shape
from metaembed_jax.config.keys import with_keys
from metaembed_jax.config.run import RECOMPUTE, RunConfig
from metaembed_jax.errors import UserError
from metaembed_jax.flops import train_flops
from metaembed_jax.mesh import make_mesh
from metaembed_jax.network_config import model_config
from metaembed_jax.planning.plan import Plan
from metaembed_jax.planning.planner import make_plan
from metaembed_jax.planning.topology import Topology
from metaembed_jax.planning.typical_rows import typical_rows
from metaembed_jax.sharding import MESH_AXES, shard_bytes
from metaembed_jax.training.step import make_trainer

COMPILED = 6  # at most
PASSES = {"everything": 4, "microbatches": 3, "layers": 3, "nothing": 2}  # of the weights in a microbatch: forward, again, backward
KEPT_WIDTHS = 14  # of a layer that keeps what it computes, and its input, beside the input alone: the widest maps weigh most
KEPT_BYTES = 2  # of a number of an activation
MOST_AT_ONCE = 4  # rows of a device, unless it is all


class Candidate(NamedTuple):
    """A way to lay out a step; sorted, the best guess comes first.

    Attributes:
      seconds: a guess at the step's bound.
      data, fsdp, tensor: the mesh.
      at_once: rows of a microbatch.
      recompute: a rung of the ladder.
      held: bytes of a device that the state takes.
      kept: at least so many beside it, for what the backward pass reads.
    """

    seconds: float
    data: int
    fsdp: int
    tensor: int
    at_once: int
    recompute: str
    held: int
    kept: float

    @property
    def mesh(self) -> tuple[int, int, int]:
        """Its sizes."""
        return self.data, self.fsdp, self.tensor


def search(config: RunConfig, where: Topology) -> list[Plan]:
    """Plans of train steps that fit, fastest first.

    Raises:
      UserError: no mesh divides the slice.
    """
    left = [one for one in candidates(config, where) if one.held + one.kept <= where.chip.usable_bytes]
    fitting = []
    with tqdm(total=min(COMPILED, len(left)), desc="compiling", unit="plan") as bar:
        while left and bar.n < COMPILED:
            tried = left.pop(0)
            plan = make_plan(_laid_out(config, tried), "train", where)
            bar.update()
            if plan.fits:
                fitting.append(plan)
            else:  # what it takes beside the state grows with the microbatch
                left = [x for x in left if (x.mesh, x.recompute) != (tried.mesh, tried.recompute) or x.at_once < tried.at_once]
    return sorted(fitting, key=lambda plan: -plan.items_per_second)


def candidates(config: RunConfig, where: Topology) -> list[Candidate]:
    """All meshes, microbatches of a few rows and rungs of the ladder, the fastest by a rough count first.

    Raises:
      UserError: there are none.
    """
    devices, (row, typical) = len(where.devices), typical_rows(config)
    parts = family(config.model.backbone).flop_counts(model_config(config).architecture, row)
    heads, listed = math.gcd(*(attention.key_heads for part in parts if part.has_meta for attention in part.attention)), []
    for fsdp, tensor in itertools.product(_divisors(devices), _divisors(heads)):
        shards = devices // tensor
        if devices // where.slices % (fsdp * tensor) or config.rows.batch_size % shards:  # both stay inside a slice
            continue
        mesh = make_mesh(devices // (fsdp * tensor), fsdp, tensor, devices=where.devices)
        state = make_trainer(config, mesh).abstract
        bytes_held = shard_bytes(state.parameters), shard_bytes(state.frozen), shard_bytes(state)
        all_rows = step_shape(row, typical.most, 0, shards).size
        sizes = {step_shape(row, typical.most, shards * count, shards).size for count in range(1, MOST_AT_ONCE + 1)}
        for at_once, recompute in itertools.product(sorted(sizes | {all_rows}), RECOMPUTE):
            if recompute in ("layers", "nothing") or at_once < all_rows:  # of one microbatch, the others are the same
                shape = step_shape(row, typical.most, at_once, shards)
                listed.append(_candidate(config, where, mesh.shape, shape, recompute, parts, *bytes_held))
    if not listed:
        raise UserError(f"--search: no mesh of {devices} devices divides config.rows.batch_size={config.rows.batch_size}")
    return sorted(listed)


def _candidate(
    config: RunConfig,
    where: Topology,
    mesh: Mapping[str, int],
    shape: StepShape,
    recompute: str,
    parts: tuple[FlopCount, ...],
    trained: int,
    frozen: int,
    held: int,
) -> Candidate:
    """Estimates seconds by the arithmetic, and the traffic of weights (`fsdp`), activations (`tensor`) and gradients (slices).

    Args:
      trained, frozen, held: bytes on a device, of weights and of the whole state.
    """
    chip, (data, fsdp, tensor) = where.chip, mesh.values()
    of_a_row = KEPT_BYTES * sum(part.positions * part.width * part.layers for part in parts)
    rows = (shape.size if recompute in ("everything", "microbatches") else shape.rows) // (data * fsdp)
    kept = rows * of_a_row * (KEPT_WIDTHS if recompute in ("microbatches", "nothing") else 1)
    reduced = 2 * 2 * shape.size // (data * fsdp) * of_a_row * (tensor - 1) / tensor  # two all-reduces a layer, of twice its bytes
    sent = shape.microbatches * PASSES[recompute] * ((trained + frozen) * (fsdp - 1) + reduced)
    between = shape.microbatches * 2 * trained * (where.slices - 1) / where.slices
    with_rung = with_keys(config, {"rows.recompute": recompute})
    seconds = max(
        sum(train_flops(with_rung, shape)) / len(where.devices) * chip.devices / chip.flops,
        sent * chip.devices / (chip.ici_bandwidth / 2),
        between * chip.devices / chip.dcn_bandwidth,
    )
    return Candidate(seconds, data, fsdp, tensor, shape.size, recompute, held, kept)


def _laid_out(config: RunConfig, candidate: Candidate) -> RunConfig:
    changes = {"rows.microbatch_rows": candidate.at_once, "rows.recompute": candidate.recompute}
    axes = {f"mesh.{axis}": size for axis, size in zip(MESH_AXES, candidate.mesh, strict=True)}
    return with_keys(config, changes | axes)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
