"""Which mesh and microbatch train fastest on a slice. Compiling takes minutes: only the most promising are compiled."""

import copy
import itertools
import math
from typing import NamedTuple

from ml_collections import ConfigDict
from tqdm import tqdm

from metaembed_jax.backbones import family
from metaembed_jax.backbones.parts import Part
from metaembed_jax.config import model_config
from metaembed_jax.errors import UserError
from metaembed_jax.planning.chips import Topology
from metaembed_jax.planning.flops import train_flops
from metaembed_jax.planning.measure import make_plan, shard_bytes
from metaembed_jax.planning.plan import Plan
from metaembed_jax.sharding import make_mesh
from metaembed_jax.training.step import make_trainer

COMPILED = 6  # at most
PASSES = 4  # of the weights in a step: forward, again for the microbatch, again for each layer, backward
KEPT_WIDTH = 2  # bytes of a number of an activation


class Candidate(NamedTuple):
    """A way to lay out a step; sorted, the best guess comes first.

    Attributes:
      seconds: a guess at the step's bound.
      data, fsdp, tensor: the mesh.
      microbatch: pairs encoded at once.
      held: bytes of a device that the state takes.
      kept: at least so many beside it, for the inputs of layers.
    """

    seconds: float
    data: int
    fsdp: int
    tensor: int
    microbatch: int
    held: int
    kept: float

    @property
    def mesh(self) -> tuple[int, int, int]:
        """Its sizes."""
        return self.data, self.fsdp, self.tensor


def search(config: ConfigDict, where: Topology) -> list[Plan]:
    """Plans of train steps that fit, fastest first.

    Raises:
      UserError: no mesh and microbatch divide the batch.
    """
    left = [one for one in candidates(config, where) if one.held + one.kept <= where.chip.usable_bytes]
    fitting = []
    with tqdm(total=min(COMPILED, len(left)), desc="compiling", unit="plan") as bar:
        while left and bar.n < COMPILED:
            one = left.pop(0)
            plan = make_plan(_laid_out(config, one.mesh, one.microbatch), "train", where)
            bar.update()
            if plan.fits:
                fitting.append(plan)
            else:  # what it takes beside the state grows with the microbatch
                scale = (plan.total_bytes - one.held) / one.microbatch
                left = [x for x in left if x.mesh != one.mesh or x.held + scale * x.microbatch <= where.chip.usable_bytes]
    return sorted(fitting, key=lambda plan: -plan.items_per_second)


def candidates(config: ConfigDict, where: Topology) -> list[Candidate]:
    """All meshes and microbatches that divide what they split, the fastest by a rough count first.

    Raises:
      UserError: there are none.
    """
    devices = len(where.devices)
    heads = math.gcd(*(one.key_heads for part in _parts(config) if part.appended for one in part.attention))
    found = []
    for fsdp, tensor in itertools.product(_divisors(devices), _divisors(heads)):
        if devices // where.slices % (fsdp * tensor):  # both stay inside a slice
            continue
        mesh = (devices // (fsdp * tensor), fsdp, tensor)
        sizes = [size for size in _divisors(config.batch_size) if size % (devices // tensor) == 0]
        if sizes:
            state = make_trainer(config, make_mesh(*mesh, devices=where.devices)).abstract
            shards = shard_bytes(state.parameters), shard_bytes(state.frozen), shard_bytes(state)
            found += [_candidate(_laid_out(config, mesh, size), where, *shards) for size in sizes]
    if not found:
        raise UserError(f"--search: no mesh of {devices} devices and no microbatch divide config.batch_size={config.batch_size}")
    return sorted(found)


def _candidate(config: ConfigDict, where: Topology, trained: int, frozen: int, held: int) -> Candidate:
    """Estimates seconds by the arithmetic, and the traffic of weights (`fsdp`), activations (`tensor`) and gradients (slices).

    Args:
      trained, frozen, held: bytes on a device, of weights and of the whole state.
    """
    mesh, chip = config.mesh, where.chip
    rows = config.microbatch_size // (mesh.data * mesh.fsdp)
    kept = KEPT_WIDTH * rows * sum(part.rows * part.width * part.layers for part in _parts(config))
    encoded = config.batch_size // config.microbatch_size * len(_shapes(config))
    reduced = 2 * 2 * kept * (mesh.tensor - 1) / mesh.tensor  # two all-reduces a layer, each of twice its bytes
    sent = encoded * PASSES * ((trained + frozen) * (mesh.fsdp - 1) + reduced)
    between = encoded * 2 * trained * (where.slices - 1) / where.slices
    seconds = max(
        sum(train_flops(config)) / len(where.devices) * chip.devices / chip.flops,
        sent * chip.devices / (chip.ici_bandwidth / 2),
        between * chip.devices / chip.dcn_bandwidth,
    )
    return Candidate(seconds, mesh.data, mesh.fsdp, mesh.tensor, config.microbatch_size, held, kept)


def _parts(config: ConfigDict) -> tuple[Part, ...]:
    """Of the network, for the longest item with the most patches."""
    tokens, patches = (max(shape[part] for shape in _shapes(config)) for part in (0, 1))
    rows = tokens + config.query_tokens + config.candidate_tokens
    return family(config.backbone).parts(model_config(config).architecture, patches, rows, config.candidate_tokens)


def _shapes(config: ConfigDict) -> list[tuple]:
    return [shape for key in ("query_shapes", "candidate_shapes") for shape in config.data[key]]


def _laid_out(config: ConfigDict, mesh: tuple[int, int, int], microbatch: int) -> ConfigDict:
    config = copy.deepcopy(config)
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
    config.microbatch_size = microbatch
    return config


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
