"""One module of ours beside one of transformers'."""

import jax
import numpy as np
from flax import nnx

TOLERANCE = dict(rtol=2e-5, atol=2e-5)


def layer_of(stack: nnx.Module, number: int) -> nnx.Module:
    """One layer of a stack."""
    graph, state = nnx.split(stack)
    return nnx.merge(graph, jax.tree.map(lambda x: x[number], state))


def run(module, *arguments, **keywords):
    """What a module of torch gives for arrays."""
    import torch

    with torch.no_grad():
        return module(*(torch.tensor(np.asarray(x)) for x in arguments), **keywords)
