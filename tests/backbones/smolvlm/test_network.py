"""Each part of SmolVLM against the module of transformers that it stands for, and items in shared rows against each alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metaembed_jax.batch.items import Size
from metaembed_jax.batch.rows import RowItem, collate
from metaembed_jax.checkpoints.loading import load
from metaembed_jax.mesh import make_mesh
from metaembed_jax.network import abstract_network
from tests.backbones.modules import TOLERANCE, assert_company_is_unseen, layer_of, run
from tests.backbones.smolvlm.reference import CONFIGURATIONS, LARGE, SMALL, TALL, Transformers, write_checkpoint

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

PICTURES = [TALL, LARGE, SMALL]


class Case:
    """A checkpoint on both sides, and three pictures of different tilings as each sees them: 3, 5 and 3 tiles."""

    def __init__(self, directory):
        write_checkpoint(directory, CONFIGURATIONS["marked"])
        network, parameters, self.processor = load(directory, "float32", make_mesh(devices=jax.devices()[:1]), 0, 1024)
        self.network = nnx.merge(abstract_network(network)[0], parameters)
        self.config, self.backbone = network.architecture, self.network.backbone
        self.vision, self.tower = self.config.vision_config, self.backbone.vision
        theirs = Transformers(directory)
        self.core = theirs.model.model
        items = [RowItem(self.processor.document({"image": picture}), 1, 1) for picture in PICTURES]
        self.tiles = [item.size.patches // self.vision.patches for item in items]
        row = Size(200, (sum(self.tiles) + 1) * self.vision.patches, 3)
        self.batch = collate([items], row, self.config.layout)
        self.seen = theirs.processor.image_processor([[picture] for picture in PICTURES], return_tensors="pt")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("checkpoint"))


def values(*shape):
    return np.random.default_rng(5).normal(size=shape).astype(np.float32)


def test_patch_embedding_and_positions(case):
    pixels = case.seen["pixel_values"].flatten(0, 1)
    pixels = pixels[pixels.flatten(1).any(dim=1)]  # without padding
    assert case.tiles == [3, 5, 3] and len(pixels) == 11
    mask = torch.ones(len(pixels), case.vision.side, case.vision.side, dtype=torch.bool)
    theirs = run(case.core.vision_model.embeddings, pixels, patch_attention_mask=mask)
    tiles_TNX = case.batch.patches.reshape(12, case.vision.patches, -1)[:11]
    np.testing.assert_allclose(case.tower.embed_patches(tiles_TNX, jnp.float32), theirs, **TOLERANCE)


def test_vision_block(case):
    x_TND = values(2, case.vision.patches, case.vision.hidden_size)
    ours = jax.jit(layer_of(case.tower.blocks, 1))(x_TND, None)
    theirs = run(case.core.vision_model.encoder.layers[1], x_TND, attention_mask=None)
    np.testing.assert_allclose(ours, theirs, **TOLERANCE)


def test_merging_of_patches(case):
    """The shuffle, and the projection of what it puts behind each other."""
    x_TND = values(3, case.vision.patches, case.vision.hidden_size)
    np.testing.assert_allclose(jax.jit(case.tower.project)(x_TND), run(case.core.connector, x_TND), **TOLERANCE)


def test_vision_tower(case):
    """All visual tokens of a row, in the order in which the prompts have them; what stands in padding is read by nobody."""
    tower = jax.jit(functools.partial(case.tower, dtype=jnp.float32, checkpoint=False, unroll=1))
    units_UD, visual_S = np.asarray(tower(case.batch))[0], case.batch.visual[0]
    theirs = run(case.core.get_image_features, *case.seen.values())
    expected = torch.cat([*theirs.pooler_output]).flatten(0, -2)
    np.testing.assert_allclose(units_UD[visual_S[visual_S >= 0]], expected, **TOLERANCE)


def test_norm(case):
    x_BSD = 3 * values(2, 5, case.config.width)
    np.testing.assert_allclose(case.backbone.final_norm(x_BSD), run(case.core.text_model.norm, x_BSD), **TOLERANCE)


def test_decoder_layer_and_rotary_angles(case):
    """Two items and padding, which sees itself: no empty softmax."""
    text, segments, positions = case.core.text_model, np.repeat([1, 2, 0], [4, 5, 2]), np.r_[:4, :5, 0, 0]
    x_BSD = values(1, len(segments), case.config.width)
    angles = case.backbone.rotary(positions[None, None])
    expected = run(text.rotary_emb, np.zeros(1, np.float32), positions[None])
    for ours, theirs in zip(angles, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, **TOLERANCE)
    ours = jax.jit(layer_of(case.backbone.layers, 1))(x_BSD, None, segments[None], *angles)
    seen = np.tril(segments[:, None] == segments)[None, None]
    hidden = torch.where(torch.tensor(seen), 0.0, torch.finfo(torch.float32).min)
    theirs = run(text.layers[1], x_BSD, attention_mask=hidden, position_embeddings=expected)
    np.testing.assert_allclose(ours[0, :-2], theirs.numpy()[0, :-2], **TOLERANCE)


def test_items_in_shared_rows_are_as_alone(case):
    """Texts of very different lengths; images of 3 and 5 tiles in the same row."""
    queries = [{"text": "a red car"}, {"text": "where " * 30, "image": TALL}, {"text": ""}]
    documents = [{"image": LARGE}, {"text": "left of the hut " * 20}, {"text": "x", "image": SMALL}]
    process = case.processor
    assert_company_is_unseen(case.network, [*map(process.query, queries)], [*map(process.document, documents)])
