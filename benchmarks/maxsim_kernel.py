"""What the TPU's MaxSim kernel holds and moves, beside XLA's: `python benchmarks/maxsim_kernel.py`; no TPU needed.

100,000 candidates of 64 vectors, 3,584 wide, bfloat16, split over a slice; 1, 8 and 32 queries of 16 vectors. Figures are of a
device:

    floor      its candidates, read once
    stated     what the kernel says of itself: candidates and queries for every block of queries, and the scores
    grid       counted by walking the grid: a block is moved whenever its place changes
    compiled   what the compiled program moves, by `metaembed_jax.planning`

VMEM is what the kernel's blocks take, and the kernel is compiled with that, rounded up to a MiB, as its limit. Times are at the
chip's published peaks, columns that are only filling included.
"""

import argparse
import itertools
import math
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metaembed_jax.late_interaction import maxsim, maxsim_tpu
from metaembed_jax.planning import cost
from metaembed_jax.planning.chips import topology
from metaembed_jax.sharding import make_mesh

CANDIDATES, CANDIDATE_VECTORS, QUERY_VECTORS, WIDTH = 100_000, 64, 16, 3584
LAST = "*after_optimizations.txt"


class Compiled(NamedTuple):
    """Of a device: bytes that a program makes in HBM besides its result, and that it moves there."""

    temporaries: int
    moved: float


def main() -> None:
    """Prints a few lines for each slice and number of queries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topologies", nargs="*", default=["v5e:2x4", "v6e:2x4"], help="slices (default: v5e:2x4 v6e:2x4)")
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 8, 32], help="how many at once (default: 1 8 32)")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # it holds no programs of absent chips
    for name, queries in itertools.product(arguments.topologies, arguments.queries):
        where = topology(name)
        mesh = make_mesh(devices=where.devices)
        query, candidate = shapes(mesh, queries)
        local = jax.ShapeDtypeStruct((candidate.shape[0] // mesh.size, *candidate.shape[1:]), candidate.dtype)
        blocks, floor = maxsim_tpu.choose_blocks(query, local), local.size * local.dtype.itemsize
        maxsim_tpu.VMEM_LIMIT = 2**20 * math.ceil(blocks.vmem_bytes / 2**20)
        kernel, xla = (compiled(score, mesh, query, candidate) for score in (maxsim_tpu.score, maxsim._xla))
        stated, walked = moved(query, local)
        parts = -(-queries // blocks.queries)
        arithmetic = 2 * parts * blocks.columns * local.size
        seconds = {"HBM": stated / where.chip.hbm_bandwidth, "arithmetic": arithmetic / where.chip.flops}
        bound = max(seconds, key=seconds.get)
        print(f"{name}, {queries} queries, {parts} x {tuple(blocks[:4])}: VMEM {mebibytes(blocks.vmem_bytes)}", end="")
        print(f", floor {floor / 1e9:.3f} GB, stated {stated / 1e9:.3f} ({stated / floor:.4f}), grid {walked / 1e9:.3f}", end="")
        print(f", compiled {kernel.moved / 1e9:.3f}, temporaries {mebibytes(kernel.temporaries)}")
        print("    " + ", ".join(f"{what} {1000 * time:.2f} ms" for what, time in seconds.items()) + f": bound by {bound}")
        print(f"    XLA: compiled {xla.moved / 1e9:.3f} GB ({xla.moved / floor:.2f})", end="")
        print(f", temporaries {mebibytes(xla.temporaries)}, HBM {1000 * xla.moved / where.chip.hbm_bandwidth:.2f} ms", flush=True)


def shapes(mesh: Mesh, queries: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Queries on every device, candidates over all."""
    whole, split = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec(mesh.axis_names)))
    candidates = -(-CANDIDATES // mesh.size) * mesh.size
    return (
        jax.ShapeDtypeStruct((queries, QUERY_VECTORS, WIDTH), jnp.bfloat16, sharding=whole),
        jax.ShapeDtypeStruct((candidates, CANDIDATE_VECTORS, WIDTH), jnp.bfloat16, sharding=split),
    )


def compiled(score, mesh: Mesh, query: jax.ShapeDtypeStruct, candidate: jax.ShapeDtypeStruct) -> Compiled:
    """Compiles a way to score on the devices of a mesh."""
    specs = query.sharding.spec, candidate.sharding.spec
    out = PartitionSpec(None, mesh.axis_names)

    @jax.jit
    def on_mesh(query, candidate):
        one = lambda query, candidate: score(query, candidate)  # noqa: E731
        return jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(query, candidate)

    with tempfile.TemporaryDirectory() as directory:
        options = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
        program = on_mesh.lower(query, candidate).compile(compiler_options=options)
        text = next(Path(directory).glob(LAST)).read_text()  # `as_text` ends the process for some chips
    return Compiled(program.memory_analysis().temp_size_in_bytes, cost.count(text, mesh.size).hbm_bytes)


def moved(query: jax.ShapeDtypeStruct, candidate: jax.ShapeDtypeStruct) -> tuple[int, int]:
    """(what the kernel states, what its grid says) of bytes between HBM and VMEM."""
    equations = jax.make_jaxpr(maxsim_tpu.score)(query, candidate).eqns
    (kernel,) = (equation.params for equation in equations if equation.primitive.name == "pallas_call")
    grid, total = kernel["grid_mapping"].grid, 0
    points = jnp.stack(jnp.meshgrid(*map(jnp.arange, grid), indexing="ij"), -1).reshape(-1, len(grid))
    for block in kernel["grid_mapping"].block_mappings:
        places = jax.vmap(lambda point, block=block: jax.core.eval_jaxpr(block.index_map_jaxpr.jaxpr, [], *point))(points)
        before, array = None, block.array_aval
        sizes = [getattr(size, "block_size", 1) for size in block.block_shape]
        for place in zip(*(axis.tolist() for axis in places), strict=True):
            if place != before:
                inside = (min(size, whole - at * size) for size, whole, at in zip(sizes, array.shape, place, strict=True))
                total += math.prod(inside) * array.dtype.itemsize
            before = place
    return kernel["cost_estimate"].bytes_accessed, total


def mebibytes(size: int) -> str:
    """A size in MiB."""
    return f"{size / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
