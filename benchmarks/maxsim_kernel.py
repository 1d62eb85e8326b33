"""Memory and HBM traffic of the TPU's search, with its kernels and by XLA: `python benchmarks/maxsim_kernel.py`. It needs no TPU.

100,000 documents of 64 vectors, 3,584 wide, bfloat16, resident on a slice; 1, 8 and 32 queries of 16 vectors, float32. Figures are
per device:

    floor      its documents, read once
    stated     the kernel's own estimate: documents and queries once for each block of queries, and the scores
    grid       counted over the grid: a block is moved whenever its index changes
    search     traffic of the compiled search, by `metaembed_jax.planning`, with the ten best

VMEM is the size of the kernel's blocks. Times are at the chip's published peaks, and include rows of padding.
"""

import argparse
import functools
import itertools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metaembed_jax.late_interaction import engine, maxsim_tpu
from metaembed_jax.late_interaction.budgets import search_name
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.stages import Stages, as_stages
from metaembed_jax.late_interaction.tiles import TILE, Tiles, count_tiles
from metaembed_jax.mesh import make_mesh
from metaembed_jax.planning import cost
from metaembed_jax.planning.topology import topology

DOCUMENTS, DOCUMENT_VECTORS, QUERY_VECTORS, WIDTH = 100_000, 64, 16, 3584
STAGES = as_stages(((1, 1, 1000), (QUERY_VECTORS, DOCUMENT_VECTORS)), Budget(QUERY_VECTORS, DOCUMENT_VECTORS))
LAST = "*after_optimizations.txt"


class Compiled(NamedTuple):
    """Bytes of temporaries of a program in a device's HBM, and of its traffic with the HBM."""

    temporaries: int
    moved: float


def main() -> None:
    """Print a few lines for each slice and number of queries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topologies", nargs="*", default=["v5e:2x4", "v6e:2x4"], help="slices (default: v5e:2x4 v6e:2x4)")
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 8, 32], help="how many at once (default: 1 8 32)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "int8"), default="bfloat16", help="of the documents")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # it holds no programs of absent chips
    for name, queries in itertools.product(arguments.topologies, arguments.queries):
        target = topology(name)
        mesh = make_mesh(devices=target.devices)
        query, tiles = shapes(mesh, queries, arguments.dtype)
        stated, walked, blocks = kernel(mesh, query, tiles)
        floor = DOCUMENTS / mesh.size * DOCUMENT_VECTORS * (WIDTH * tiles.vectors.dtype.itemsize + 4 * (tiles.scales is not None))
        seconds = {"HBM": stated.bytes_accessed / target.chip.hbm_bandwidth, "arithmetic": stated.flops / target.chip.flops}
        bound = max(seconds, key=seconds.get)
        print(f"{name}, {queries} queries, {-(-queries // blocks.queries)} x {tuple(blocks[:-1])}", end="")
        print(f": VMEM {mebibytes(blocks.vmem_bytes)}, floor {floor / 1e9:.3f} GB", end="")
        print(f", stated {stated.bytes_accessed / 1e9:.3f}, grid {walked / 1e9:.3f}; ", end="")
        print(", ".join(f"{name} {1000 * time:.2f} ms" for name, time in seconds.items()) + f": bound by {bound}")
        for stages, is_tpu in itertools.product((STAGES[1:], STAGES), (True, False)):
            program = compiled(mesh, query, tiles, stages, is_tpu)
            label = f"{search_name(stages)}, {'kernels' if is_tpu else 'XLA'}"
            print(f"    {label:28}{program.moved / 1e9:7.3f} GB ({program.moved / floor:.4f})", end="")
            print(f", temporaries {mebibytes(program.temporaries)}", flush=True)


def shapes(mesh: Mesh, queries: int, dtype: str) -> tuple[jax.ShapeDtypeStruct, Tiles]:
    """Return the shapes of queries, replicated, and of tiles, sharded over all devices."""
    whole, split = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec(mesh.axis_names)))
    tiles = count_tiles(DOCUMENTS, mesh.size)
    return (
        jax.ShapeDtypeStruct((queries, QUERY_VECTORS, WIDTH), jnp.float32, sharding=whole),
        Tiles(
            jax.ShapeDtypeStruct((tiles, DOCUMENT_VECTORS, TILE, WIDTH), dtype, sharding=split),
            jax.ShapeDtypeStruct((tiles, DOCUMENT_VECTORS, TILE), jnp.float32, sharding=split) if dtype == "int8" else None,
            None,
            jax.ShapeDtypeStruct((tiles, TILE), bool, sharding=split),
            jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        ),
    )


def compiled(mesh: Mesh, query: jax.ShapeDtypeStruct, tiles: Tiles, stages: Stages, is_tpu: bool) -> Compiled:
    """Compile the search, with kernels or without."""
    engine._is_tpu = lambda mesh: is_tpu
    search = jax.jit(functools.partial(engine.search.__wrapped__, stages=stages, k=10, mesh=mesh))
    with tempfile.TemporaryDirectory() as directory:
        options = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
        queries = [
            jax.ShapeDtypeStruct((len(query), budget.query, WIDTH), query.dtype, sharding=query.sharding) for budget, _ in stages
        ]
        program = search.lower(tuple(queries), (tiles,)).compile(compiler_options=options)
        text = next(Path(directory).glob(LAST)).read_text()  # `as_text` ends the process for some chips
    return Compiled(program.memory_analysis().temp_size_in_bytes, cost.count(text, mesh.size).hbm_bytes)


def kernel(mesh: Mesh, query: jax.ShapeDtypeStruct, tiles: Tiles):
    """Return what the kernel states for a device, the bytes that its grid moves, and its blocks."""
    local = [None if x is None else jax.ShapeDtypeStruct((x.shape[0] // mesh.size, *x.shape[1:]), x.dtype) for x in tiles[:2]]
    blocks = maxsim_tpu.choose_blocks(query, local[0], DOCUMENT_VECTORS)
    score = functools.partial(maxsim_tpu.score, counts_Tn=None, document_vectors=DOCUMENT_VECTORS)
    stated, walked = moved(score, query, *local)
    return stated, walked, blocks


def moved(score: Callable, *arrays: jax.ShapeDtypeStruct | None):
    """Return the kernel's own estimate, and the bytes between HBM and VMEM that its grid moves."""
    equations = jax.make_jaxpr(score)(*arrays).eqns
    (kernel,) = (equation.params for equation in equations if equation.primitive.name == "pallas_call")
    grid, total = kernel["grid_mapping"].grid, 0
    points = jnp.stack(jnp.meshgrid(*map(jnp.arange, grid), indexing="ij"), -1).reshape(-1, len(grid))
    for block in kernel["grid_mapping"].block_mappings:
        indices = jax.vmap(lambda point, block=block: jax.core.eval_jaxpr(block.index_map_jaxpr.jaxpr, [], *point))(points)
        previous, array = None, block.array_aval
        sizes = [getattr(size, "block_size", 1) for size in block.block_shape]
        for index in zip(*(axis.tolist() for axis in indices), strict=True):
            if index != previous:
                shape = (min(size, whole - number * size) for size, whole, number in zip(sizes, array.shape, index, strict=True))
                total += math.prod(shape) * array.dtype.itemsize
            previous = index
    return kernel["cost_estimate"], total


def mebibytes(size: int) -> str:
    """Format a size in MiB."""
    return f"{size / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
