"""Search the mesh, microbatch and recomputation that train fastest on a slice.

A compilation takes minutes, so an estimate ranks all layouts, and only the best are compiled.
"""

import itertools
import math
from typing import NamedTuple

from jax.sharding import Mesh
from tqdm import tqdm

from metaembed_jax.backbones.family import family
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

COMPILED = 6  # layouts at most
PASSES = {"everything": 4, "microbatches": 3, "layers": 3, "nothing": 2}  # over the weights: forward, recomputed, backward
KEPT_WIDTHS = 14  # activations of a layer that keeps all of them, as a multiple of its input: the widest maps weigh most
KEPT_BYTES = 2  # of a number of an activation
MOST_AT_ONCE = 4  # rows of a microbatch on a device, unless it has all rows


class MeshLayout(NamedTuple):
    """A layout of the train step; sorting puts the best estimate first.

    Attributes:
      seconds: estimated bound of the step.
      data, fsdp, tensor: the mesh.
      at_once: rows of a microbatch.
      recompute: a value of `config.rows.recompute`.
      held: bytes of a device for the state.
      kept: a lower bound of the bytes of a device for what the backward pass reads.
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
        """Sizes of the mesh."""
        return self.data, self.fsdp, self.tensor


def search(config: RunConfig, slices: Topology) -> list[Plan]:
    """Return the plans that fit among the compiled ones, the fastest first.

    Raises:
      UserError: no mesh of the slices divides the batch.
    """
    remaining = [layout for layout in layouts(config, slices) if layout.held + layout.kept <= slices.chip.usable_bytes]
    fitting = []
    with tqdm(total=min(COMPILED, len(remaining)), desc="compiling", unit="plan") as bar:
        while remaining and bar.n < COMPILED:
            layout = remaining.pop(0)
            plan = make_plan(_with_layout(config, layout), "train", slices)
            bar.update()
            if plan.fits:
                fitting.append(plan)
            else:  # memory other than the state grows with the microbatch
                remaining = [other for other in remaining if not _needs_more(other, layout)]
    return sorted(fitting, key=lambda plan: -plan.items_per_second)


def _needs_more(other: MeshLayout, layout: MeshLayout) -> bool:
    is_alike = (other.mesh, other.recompute) == (layout.mesh, layout.recompute)
    return is_alike and other.at_once >= layout.at_once


def layouts(config: RunConfig, slices: Topology) -> list[MeshLayout]:
    """Return all combinations of a mesh, a microbatch of a few rows and `config.rows.recompute`, the best estimate first.

    Raises:
      UserError: no mesh of the slices divides the batch.
    """
    devices, (row, typical) = len(slices.devices), typical_rows(config)
    counts = family(config.model.backbone).flop_counts(model_config(config).architecture, row)
    heads = math.gcd(*(attention.key_heads for count in counts if count.has_meta for attention in count.attention))
    row_bytes = KEPT_BYTES * sum(count.positions * count.width * count.layers for count in counts)
    estimates = []
    for fsdp, tensor in itertools.product(_divisors(devices), _divisors(heads)):
        shards = devices // tensor
        if devices // slices.slices % (fsdp * tensor) or config.rows.batch_size % shards:  # both stay inside a slice
            continue
        mesh = make_mesh(devices // (fsdp * tensor), fsdp, tensor, devices=slices.devices)
        state = _state_bytes(config, mesh)
        all_rows = step_shape(row, typical.largest, 0, shards).size
        sizes = {step_shape(row, typical.largest, shards * count, shards).size for count in range(1, MOST_AT_ONCE + 1)}
        for at_once, recompute in itertools.product(sorted(sizes | {all_rows}), RECOMPUTE):
            if recompute in ("layers", "nothing") or at_once < all_rows:  # with one microbatch, the others equal these
                shape = step_shape(row, typical.largest, at_once, shards)
                estimates.append(_estimate(config, slices, mesh, shape, recompute, row_bytes, state))
    if not estimates:
        raise UserError(f"--search: no mesh of {devices} devices divides config.rows.batch_size={config.rows.batch_size}")
    return sorted(estimates)


class _StateBytes(NamedTuple):
    """Bytes on a device: of trained weights, of frozen ones, and of the whole state."""

    trained: int
    frozen: int
    state: int


def _state_bytes(config: RunConfig, mesh: Mesh) -> _StateBytes:
    state = make_trainer(config, mesh).abstract
    return _StateBytes(shard_bytes(state.parameters), shard_bytes(state.frozen), shard_bytes(state))


def _estimate(
    config: RunConfig, slices: Topology, mesh: Mesh, shape: StepShape, recompute: str, row_bytes: float, held: _StateBytes
) -> MeshLayout:
    """Estimate a layout by its arithmetic, and its traffic of weights (`fsdp`), activations (`tensor`) and gradients (slices).

    Args:
      row_bytes: bytes of the inputs of all layers, for one row.
    """
    chip, (data, fsdp, tensor) = slices.chip, mesh.shape.values()
    rows = (shape.size if recompute in ("everything", "microbatches") else shape.rows) // (data * fsdp)
    kept = rows * row_bytes * (KEPT_WIDTHS if recompute in ("microbatches", "nothing") else 1)
    # Two all-reduces a layer; each sends twice its bytes.
    reduced = 2 * 2 * shape.size // (data * fsdp) * row_bytes * (tensor - 1) / tensor
    sent = shape.microbatches * PASSES[recompute] * ((held.trained + held.frozen) * (fsdp - 1) + reduced)
    between = shape.microbatches * 2 * held.trained * (slices.slices - 1) / slices.slices
    flops = sum(train_flops(with_keys(config, {"rows.recompute": recompute}), shape))
    seconds = max(
        flops / len(slices.devices) * chip.devices / chip.flops,
        sent * chip.devices / (chip.ici_bandwidth / 2),
        between * chip.devices / chip.dcn_bandwidth,
    )
    return MeshLayout(seconds, data, fsdp, tensor, shape.size, recompute, held.state, kept)


def _with_layout(config: RunConfig, layout: MeshLayout) -> RunConfig:
    changes = {"rows.microbatch_rows": layout.at_once, "rows.recompute": layout.recompute}
    axes = {f"mesh.{axis}": size for axis, size in zip(MESH_AXES, layout.mesh, strict=True)}
    return with_keys(config, changes | axes)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
