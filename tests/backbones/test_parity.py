"""The public API on directories saved by transformers, against transformers' own forward pass, on unit vectors: every family.

Rows hold two of the largest items and more of the others.
"""

import importlib

import jax
import numpy as np
import pytest

import metaembed_jax as me
from metaembed_jax.backbones.family import FAMILIES
from metaembed_jax.encoding.reading import as_item
from metaembed_jax.mesh import make_mesh
from tests.encoding.small_rows import with_small_rows

TOLERANCE = dict(rtol=0, atol=1e-5)  # float32 leaves 2e-6 at most
REFERENCES = {package: importlib.import_module(f"tests.backbones.{package}.reference") for package in FAMILIES.values()}
CASES = [(package, name) for package, reference in REFERENCES.items() for name in reference.CONFIGURATIONS]
ONE_EACH = [next(case for case in CASES if case[0] == package) for package in REFERENCES]
SIDES = ("query", "document")


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    """A checkpoint's model, with the reference's Meta Tokens; the reference, and the items of each side."""
    package, name = request.param
    reference = REFERENCES[package]
    expected = reference.reference(name, tmp_path_factory.mktemp("references"))
    model = me.MetaEmbed.from_pretrained(expected.directory, dtype="float32", mesh=make_mesh(devices=jax.devices()[:1]))
    model.parameters["meta_tokens"] = jax.device_put(expected.meta_tokens, model.parameters["meta_tokens"].sharding)
    items = {"query": reference.QUERIES, "document": reference.DOCUMENTS}
    sizes = np.array([model.processor.size(as_item(item), side)[:2] for side in SIDES for item in items[side]])
    tokens, patches = sizes.max(axis=0).tolist()
    return with_small_rows(model, 2 * tokens + 80, 2 * patches), expected, items


all_cases = pytest.mark.parametrize("case", CASES, indirect=True, ids="-".join)
one_of_each = pytest.mark.parametrize("case", ONE_EACH, indirect=True, ids="-".join)


def encode(model, side, items, **keywords):
    return {"query": model.encode_query, "document": model.encode_document}[side](items, **keywords)


@all_cases
def test_vectors_equal_transformers(case):
    model, expected, items = case
    for side in SIDES:
        vectors = encode(model, side, items[side])
        np.testing.assert_allclose(vectors, getattr(expected, side), **TOLERANCE)


@all_cases
def test_the_reference_tells_its_vectors_apart(case):
    """Agreement of vectors that are all alike would prove little."""
    _, expected, _ = case
    for vectors in (expected.query, expected.document):
        flat = vectors.reshape(-1, vectors.shape[-1])
        assert np.abs(np.linalg.norm(flat, axis=-1) - 1).max() < 1e-5
        assert np.median(np.abs(vectors[1:] - vectors[:-1]).max(axis=-1)) > 1e-2  # between items
        assert np.median(np.abs(vectors[:, 1:] - vectors[:, :-1]).max(axis=-1)) > 1e-2  # between rows of an item


@one_of_each
def test_a_budget_is_a_prefix(case):
    """The reference computed its vectors with all 80 Meta Tokens appended."""
    model, expected, items = case
    for side, budget in zip(SIDES, (3, 5), strict=True):
        row = next(row for row, item in enumerate(items[side]) if isinstance(item, dict))
        vectors = encode(model, side, [items[side][row]], budget=budget)[0]
        np.testing.assert_allclose(vectors, getattr(expected, side)[row, :budget], **TOLERANCE)


@one_of_each
def test_texts_alone_never_run_the_tower(case, monkeypatch):
    model, expected, items = case
    network = importlib.import_module(f"metaembed_jax.backbones.{FAMILIES[model.config.backbone]}.network")
    fresh = me.MetaEmbed(model.config, model.parameters, model.processor, model.mesh)

    def run(*arguments, **keywords):
        raise AssertionError("the tower runs")

    monkeypatch.setattr(network.VisionTower, "__call__", run)
    texts = [row for row, item in enumerate(items["query"]) if isinstance(item, str)]
    vectors = fresh.encode_query([items["query"][row] for row in texts])
    np.testing.assert_allclose(vectors, expected.query[texts], **TOLERANCE)
    with pytest.raises(AssertionError, match="the tower runs"):
        fresh.encode_query([item for item in items["query"] if isinstance(item, dict)])
