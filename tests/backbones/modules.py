"""Comparisons of our modules with those of transformers, and of items in shared rows with items alone."""

import jax
import numpy as np
from flax import nnx

from metaembed_jax.batch.items import Example, Size
from metaembed_jax.batch.rows import RowItem, collate
from metaembed_jax.network import Network

TOLERANCE = dict(rtol=2e-5, atol=2e-5)


def layer_of(stack: nnx.Module, number: int) -> nnx.Module:
    """One layer of a stack."""
    graph, state = nnx.split(stack)
    return nnx.merge(graph, jax.tree.map(lambda x: x[number], state))


def run(module, *arguments, **keywords):
    """Run a module of torch on arrays."""
    import torch

    with torch.no_grad():
        return module(*(torch.tensor(np.asarray(x)) for x in arguments), **keywords)


def assert_company_is_unseen(network: Network, queries: list[Example], documents: list[Example]) -> None:
    """Items have the vectors that each has alone in a row: all in one row, in that order and another, with room to spare."""
    config, layout = network.config, network.config.architecture.layout
    items = [RowItem(example, config.meta_tokens("query", 4), 4) for example in queries]
    items += [RowItem(example, config.meta_tokens("document", 8), 8) for example in documents]
    sizes = np.array([item.size for item in items])
    row = Size(*(int(total) for total in sizes.sum(axis=0) + [5, layout.multiple, 3]))
    orders = np.arange(len(items)), np.random.default_rng(0).permutation(len(items))
    batch = collate([[item] for item in items] + [[items[n] for n in order] for order in orders], row, layout)
    vectors_BVD = np.asarray(jax.jit(network)(batch))
    for order, vectors_VD in zip(orders, vectors_BVD[len(items) :], strict=True):
        alone = np.concatenate([vectors_BVD[n, : items[n].read] for n in order])
        np.testing.assert_allclose(vectors_VD[: len(alone)], alone, rtol=0, atol=1e-5)
