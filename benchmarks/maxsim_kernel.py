"""Memory and HBM traffic of the TPU's MaxSim kernel and of XLA: `python benchmarks/maxsim_kernel.py`. It needs no TPU.

100,000 documents of 64 vectors, 3,584 wide, bfloat16, sharded over a slice; 1, 8 and 32 queries of 16 vectors. Figures are per
device:

    floor      its documents, read once
    stated     the kernel's own estimate: documents and queries once for each block of queries, and the scores
    grid       counted over the grid: a block is moved whenever its index changes
    compiled   traffic of the compiled program, by `metaembed_jax.planning`

VMEM is the size of the kernel's blocks, and the kernel is compiled with that, rounded up to a MiB, as its limit. Times are at the
chip's published peaks, and include columns of padding.
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

from metaembed_jax.late_interaction import documents_tpu, maxsim
from metaembed_jax.mesh import make_mesh
from metaembed_jax.planning import cost
from metaembed_jax.planning.topology import topology

DOCUMENTS, DOCUMENT_VECTORS, QUERY_VECTORS, WIDTH = 100_000, 64, 16, 3584
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
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # it holds no programs of absent chips
    for name, queries in itertools.product(arguments.topologies, arguments.queries):
        target = topology(name)
        mesh = make_mesh(devices=target.devices)
        query, document = shapes(mesh, queries)
        local = jax.ShapeDtypeStruct((document.shape[0] // mesh.size, *document.shape[1:]), document.dtype)
        blocks, floor = documents_tpu.choose_blocks(query, local), local.size * local.dtype.itemsize
        documents_tpu.VMEM_LIMIT = 2**20 * math.ceil(blocks.vmem_bytes / 2**20)
        score = functools.partial(documents_tpu.score, blocks=blocks)
        kernel, xla = (compiled(function, mesh, query, document) for function in (score, maxsim._xla))
        stated, walked = moved(score, query, local)
        query_blocks = -(-queries // blocks.queries)
        arithmetic = 2 * query_blocks * blocks.columns * local.size
        seconds = {"HBM": stated / target.chip.hbm_bandwidth, "arithmetic": arithmetic / target.chip.flops}
        bound = max(seconds, key=seconds.get)
        print(f"{name}, {queries} queries, {query_blocks} x {tuple(blocks[:4])}: VMEM {mebibytes(blocks.vmem_bytes)}", end="")
        print(f", floor {floor / 1e9:.3f} GB, stated {stated / 1e9:.3f} ({stated / floor:.4f}), grid {walked / 1e9:.3f}", end="")
        print(f", compiled {kernel.moved / 1e9:.3f}, temporaries {mebibytes(kernel.temporaries)}")
        print("    " + ", ".join(f"{name} {1000 * time:.2f} ms" for name, time in seconds.items()) + f": bound by {bound}")
        print(f"    XLA: compiled {xla.moved / 1e9:.3f} GB ({xla.moved / floor:.2f})", end="")
        print(f", temporaries {mebibytes(xla.temporaries)}, HBM {1000 * xla.moved / target.chip.hbm_bandwidth:.2f} ms", flush=True)


def shapes(mesh: Mesh, queries: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Return the shapes of queries, replicated, and of documents, sharded over all devices."""
    whole, split = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec(mesh.axis_names)))
    documents = -(-DOCUMENTS // mesh.size) * mesh.size
    return (
        jax.ShapeDtypeStruct((queries, QUERY_VECTORS, WIDTH), jnp.bfloat16, sharding=whole),
        jax.ShapeDtypeStruct((documents, DOCUMENT_VECTORS, WIDTH), jnp.bfloat16, sharding=split),
    )


def compiled(score, mesh: Mesh, query: jax.ShapeDtypeStruct, document: jax.ShapeDtypeStruct) -> Compiled:
    """Compile a scoring function, sharded over a mesh."""
    specs = query.sharding.spec, document.sharding.spec
    out = PartitionSpec(None, mesh.axis_names)

    @jax.jit
    def on_mesh(query, document):
        on_device = lambda query, document: score(query, document)  # noqa: E731
        return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(query, document)

    with tempfile.TemporaryDirectory() as directory:
        options = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
        program = on_mesh.lower(query, document).compile(compiler_options=options)
        text = next(Path(directory).glob(LAST)).read_text()  # `as_text` ends the process for some chips
    return Compiled(program.memory_analysis().temp_size_in_bytes, cost.count(text, mesh.size).hbm_bytes)


def moved(score: Callable, query: jax.ShapeDtypeStruct, document: jax.ShapeDtypeStruct) -> tuple[int, int]:
    """Return the bytes between HBM and VMEM that the kernel states, and those that its grid moves."""
    equations = jax.make_jaxpr(score)(query, document).eqns
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
    return kernel["cost_estimate"].bytes_accessed, total


def mebibytes(size: int) -> str:
    """Format a size in MiB."""
    return f"{size / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
