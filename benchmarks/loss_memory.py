"""Memory of the loss on a TPU in a large batch, by the TPU's compiler: `python benchmarks/loss_memory.py`. It needs no TPU.

2,048 pairs of 16 query and 64 document vectors, 3,584 wide, bfloat16, forward and backward. All similarities at once would be
2,048 x 2,048 x 16 x 64 float32 numbers, 17 TB.
"""

import argparse

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from metaembed_jax.late_interaction.matryoshka import matryoshka_loss
from metaembed_jax.mesh import make_mesh
from metaembed_jax.planning.topology import topology
from metaembed_jax.sharding import BATCH_AXES

PAIRS, QUERY_VECTORS, DOCUMENT_VECTORS, WIDTH = 2048, 16, 64, 3584


def main() -> None:
    """Print a line for each slice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("topologies", nargs="*", default=["v5p:2x2x2", "v5e:8x8"], help="slices, such as v5e:8x8")
    jax.config.update("jax_platforms", "cpu")
    for name in parser.parse_args().topologies:
        mesh = make_mesh(devices=topology(name).devices)
        split = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        shapes = ((PAIRS, QUERY_VECTORS, WIDTH), (PAIRS, DOCUMENT_VECTORS, WIDTH))
        query_BRD, document_BRD = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=split) for shape in shapes)
        step = jax.jit(jax.value_and_grad(lambda q, d, mesh=mesh: matryoshka_loss(q, d, mesh=mesh)[0], argnums=(0, 1)))
        memory = step.lower(query_BRD, document_BRD).compile().memory_analysis()
        sizes = {
            "its inputs": memory.argument_size_in_bytes,
            "their gradients": memory.output_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        }
        listed = ", ".join(f"{kind} {size / 2**20:,.0f} MiB" for kind, size in sizes.items())
        print(f"{name}, {mesh.size} devices, of each: {listed}")


if __name__ == "__main__":
    main()
