"""Items in shared rows have the vectors that transformers computes for each alone, and the gradients: every family."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from metaembed_jax.batch.items import Size
from metaembed_jax.batch.packing import pack
from metaembed_jax.batch.rows import RowItem, collate
from metaembed_jax.checkpoints.loading import load
from metaembed_jax.encoding.reading import as_item
from metaembed_jax.mesh import make_mesh
from metaembed_jax.network import abstract_network
from tests.backbones.test_parity import CASES, ONE_EACH, REFERENCES

VECTORS = {"query": 16, "document": 64}


def row_items(processor, config, items):
    """Queries and documents with all their Meta Tokens."""
    items_of_rows = []
    for side, budget in VECTORS.items():
        examples = [getattr(processor, side)(as_item(item)) for item in items[side]]
        items_of_rows += [RowItem(example, config.meta_tokens(side, budget), budget) for example in examples]
    return items_of_rows


def packed(items, row, layout):
    """A batch, and the slots of each item's vectors in it."""
    rows_N2 = pack(np.array([item.size for item in items]), row)
    rows = [[items[n] for n in np.flatnonzero(rows_N2[:, 0] == number)] for number in range(rows_N2[:, 0].max() + 1)]
    slots = {}
    for number in range(len(rows)):
        first = 0
        for n in np.flatnonzero(rows_N2[:, 0] == number).tolist():
            slots[n] = number, slice(first, first + items[n].read)
            first += items[n].read
    return collate(rows, row, layout), [slots[n] for n in range(len(items))]


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    """A checkpoint's network with the reference's Meta Tokens, its items, and their vectors."""
    package, name = request.param
    reference = REFERENCES[package]
    expected = reference.reference(name, tmp_path_factory.mktemp("references"))
    config, parameters, processor = load(expected.directory, "float32", make_mesh(devices=jax.devices()[:1]), 0, 1024)
    parameters["meta_tokens"] = jnp.asarray(expected.meta_tokens)
    graph, _, _ = abstract_network(config)
    return SimpleNamespace(
        encode=jax.jit(lambda parameters, batch: nnx.merge(graph, parameters)(batch)),
        parameters=parameters,
        layout=config.architecture.layout,
        items=row_items(processor, config, {"query": reference.QUERIES, "document": reference.DOCUMENTS}),
        vectors=[*expected.query, *expected.document],
    )


@pytest.mark.parametrize("case", CASES, indirect=True, ids="-".join)
def test_shared_rows_equal_transformers(case):
    """Every row but the last holds several items; patches and tokens have room to spare, so there is padding too."""
    sizes = np.array([item.size for item in case.items])
    row = Size(int(sizes[:, 0].max() + sizes[:, 0].mean()), int(sizes[:, 1].max()) * 2 + case.layout.multiple, 160)
    batch, slots = packed(case.items, row, case.layout)
    assert len(batch.tokens) < len(case.items) / 1.8
    vectors = np.asarray(case.encode(case.parameters, batch))
    for expected, (number, slot) in zip(case.vectors, slots, strict=True):
        np.testing.assert_allclose(vectors[number, slot], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ONE_EACH, indirect=True, ids="-".join)
def test_gradients_of_shared_rows_are_those_of_rows_alone(case):
    row = Size(*(2 * np.array([item.size for item in case.items]).max(axis=0)))
    weights = [np.random.default_rng(n).normal(size=vectors.shape) for n, vectors in enumerate(case.vectors)]

    def gradients(batch, slots):
        def loss(parameters):
            vectors = case.encode(parameters, batch)
            pairs = zip(weights, slots, strict=True)
            return sum(jnp.sum(weight * vectors[number, slot]) for weight, (number, slot) in pairs)

        return flatten_dict(jax.jit(jax.grad(loss))(case.parameters), sep=".")

    shared = gradients(*packed(case.items, row, case.layout))
    alone = collate([[item] for item in case.items], row, case.layout)
    expected = gradients(alone, [(n, slice(0, item.read)) for n, item in enumerate(case.items)])
    norm = np.sqrt(sum(float((x**2).sum()) for x in expected.values()))
    difference = np.sqrt(sum(float(((shared[path] - x) ** 2).sum()) for path, x in expected.items()))
    assert norm > 0 and difference < 1e-5 * norm
