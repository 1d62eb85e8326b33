"""Each part of SmolVLM against the module of transformers that it stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metaembed_jax.checkpoints.loading import load
from metaembed_jax.inputs.examples import ShapeClass, collate
from metaembed_jax.network import abstract_network
from metaembed_jax.sharding import make_mesh
from tests.backbones.modules import TOLERANCE, layer_of, run
from tests.backbones.smolvlm.reference import CONFIGURATIONS, LARGE, SMALL, TALL, Transformers, write_checkpoint

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

PICTURES = [TALL, LARGE, SMALL]


class Case:
    """A checkpoint on both sides, and three pictures of different tilings as each sees them: 3, 5 and 3 tiles."""

    def __init__(self, directory):
        write_checkpoint(directory, CONFIGURATIONS["marked"])
        network, parameters, processor = load(directory, "float32", make_mesh(devices=jax.devices()[:1]), 0, 1024)
        self.config, self.backbone = network.architecture, nnx.merge(abstract_network(network)[0], parameters).backbone
        self.vision, self.tower = self.config.vision_config, self.backbone.vision
        theirs = Transformers(directory)
        self.core = theirs.model.model
        examples = [processor.candidate({"image": picture}) for picture in PICTURES]
        most = max(example.patches for example in examples)
        self.batch = collate(examples, ShapeClass(64, most), self.config.layout)
        self.seen = theirs.processor.image_processor([[picture] for picture in PICTURES], return_tensors="pt")

    @property
    def tiles(self):
        """Ours [T, N, X] and theirs [T, 3, y, x], both without padding."""
        is_tile = self.batch["patch_mask"][:, :: self.vision.tile_patches]
        ours = self.batch["patches"].reshape(*is_tile.shape, self.vision.tile_patches, -1)[is_tile]
        pixels = self.seen["pixel_values"].flatten(0, 1)
        return ours, pixels[pixels.flatten(1).any(dim=1)]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("checkpoint"))


def values(*shape):
    return np.random.default_rng(5).normal(size=shape).astype(np.float32)


def test_patch_embedding_and_positions(case):
    ours, pixels = case.tiles
    assert len(ours) == len(pixels) == 11
    mask = torch.ones(len(pixels), case.vision.side, case.vision.side, dtype=torch.bool)
    theirs = run(case.core.vision_model.embeddings, pixels, patch_attention_mask=mask)
    np.testing.assert_allclose(case.tower.embed_patches(ours, jnp.float32), theirs, **TOLERANCE)


def test_vision_block(case):
    x_TND = values(2, case.vision.tile_patches, case.vision.hidden_size)
    ours = jax.jit(layer_of(case.tower.blocks, 1))(x_TND, None)
    theirs = run(case.core.vision_model.encoder.layers[1], x_TND, attention_mask=None)
    np.testing.assert_allclose(ours, theirs, **TOLERANCE)


def test_merging_of_patches(case):
    """The shuffle, and the projection of what it puts behind each other."""
    x_TND = values(3, case.vision.tile_patches, case.vision.hidden_size)
    np.testing.assert_allclose(jax.jit(case.tower.merge)(x_TND), run(case.core.connector, x_TND), **TOLERANCE)


def test_vision_tower(case):
    """All visual tokens of a batch, in the order in which the prompts have them; what stands in padding is read by nobody."""
    tower = jax.jit(functools.partial(case.tower, dtype=jnp.float32, checkpoint=False, unroll=1))
    units_BUD, index_BS = np.asarray(tower(case.batch["patches"])), case.batch["visual_index"]
    theirs = run(case.core.get_image_features, *case.seen.values())
    for row, expected in enumerate(theirs.pooler_output):
        np.testing.assert_allclose(units_BUD[row, index_BS[row][index_BS[row] >= 0]], expected, **TOLERANCE)


def test_norm(case):
    x_BSD = 3 * values(2, 5, case.config.width)
    np.testing.assert_allclose(case.backbone.final_norm(x_BSD), run(case.core.text_model.norm, x_BSD), **TOLERANCE)


def test_decoder_layer_and_rotary_angles(case):
    """With left padding, where transformers counts positions from the padding and we from the prompt."""
    S, text = 11, case.core.text_model
    x_BSD, mask_BS = values(2, S, case.config.width), np.arange(S) >= np.array([[0], [4]])
    angles = case.backbone.rotary(jnp.ones((2, S), bool))
    expected = run(text.rotary_emb, np.zeros(1, np.float32), np.tile(np.arange(S), (2, 1)))
    for ours, theirs in zip(angles, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, **TOLERANCE)
    ours = jax.jit(layer_of(case.backbone.layers, 1))(x_BSD, None, mask_BS, *case.backbone.rotary(mask_BS))
    seen = mask_BS[:, None, None] & np.tril(np.ones((S, S), bool))
    hidden = torch.where(torch.tensor(seen), 0.0, torch.finfo(torch.float32).min)
    theirs = run(text.layers[1], x_BSD, attention_mask=hidden, position_embeddings=expected)
    np.testing.assert_allclose(np.asarray(ours)[mask_BS], theirs.numpy()[mask_BS], **TOLERANCE)
