"""Each part of PaliGemma against the module of transformers that it stands for, and items in shared rows against each alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from metaembed_jax.batch.items import Size
from metaembed_jax.batch.rows import RowItem, collate, empty
from metaembed_jax.checkpoints.loading import load
from metaembed_jax.mesh import make_mesh
from metaembed_jax.network import abstract_network
from tests.backbones.modules import TOLERANCE, assert_company_is_unseen, layer_of, run
from tests.backbones.paligemma.reference import Transformers, reference
from tests.backbones.qwen2_5_vl.reference import SMALL, TALL, WIDE, noise

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

PICTURES = [TALL, WIDE, SMALL]
# Prompt and Meta Tokens of the items of a row: two with more than the window of 24, one with less; and padding.
ITEMS, PADDING = ((9, 31), (3, 5), (14, 12)), 6


class Case:
    """A checkpoint on both sides, and three pictures as each sees them."""

    def __init__(self, name, scratch):
        directory = reference(name, scratch).directory
        network, parameters, self.processor = load(directory, "float32", make_mesh(devices=jax.devices()[:1]), 0, 1024)
        self.network = nnx.merge(abstract_network(network)[0], parameters)
        self.config, self.backbone = network.architecture, self.network.backbone
        self.theirs = Transformers(directory)
        self.core = self.theirs.model.model
        examples = [self.processor.document({"image": picture}) for picture in PICTURES]
        self.images = len(PICTURES), self.config.vision_config.patches
        row = Size(200, 3 * self.images[1], 3)  # all in one
        self.batch = collate([[RowItem(example, 1, 1) for example in examples]], row, self.config.layout)
        self.pixels = self.theirs.images(PICTURES, return_tensors="pt")["pixel_values"]


@pytest.fixture(scope="module", params=["gemma", "gemma2"])
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("references"))


def values(*shape):
    return np.random.default_rng(5).normal(size=shape).astype(np.float32)


def test_pixels(case):
    """Smaller and larger images than the model's, thin ones, and every mode that is opened otherwise than by copying."""
    grey = noise(61, 33, 4).convert("L")
    for picture in (*PICTURES, noise(500, 3, 4), noise(1, 90, 5), grey.convert("RGB"), Image.new("RGB", (50, 50), (1, 200, 3))):
        theirs = case.theirs.images(picture, return_tensors="np")["pixel_values"][0]
        patches = case.processor.document({"image": picture}).patch_arrays["patches"]
        vision = case.config.vision_config
        side, size = vision.image_size // vision.patch_size, vision.patch_size
        square = patches.reshape(side, side, 3, size, size).transpose(2, 0, 3, 1, 4).reshape(theirs.shape)
        mean, std = (np.asarray(x)[:, None, None] for x in (vision.image_mean, vision.image_std))
        np.testing.assert_allclose((square / 255 - mean) / std, theirs, rtol=0, atol=1e-5)


def test_patch_embedding(case):
    ours = case.backbone.vision.embed_patches(case.batch.patches.reshape(*case.images, -1), jnp.float32)
    np.testing.assert_allclose(ours, run(case.core.vision_tower.embeddings, case.pixels), **TOLERANCE)


def test_vision_block(case):
    x_IND = values(2, case.images[1], case.config.vision_config.hidden_size)
    ours = jax.jit(layer_of(case.backbone.vision.blocks, 1))(x_IND, None)
    theirs = run(case.core.vision_tower.encoder.layers[1], x_IND, attention_mask=None)
    np.testing.assert_allclose(ours, theirs, **TOLERANCE)


def test_vision_tower_and_projector(case):
    tower = jax.jit(functools.partial(case.backbone.vision, dtype=jnp.float32, checkpoint=False, unroll=1))
    theirs = run(case.core.get_image_features, case.pixels).pooler_output
    np.testing.assert_allclose(tower(case.batch).reshape(theirs.shape), theirs, **TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scaled_embedding(case, dtype):
    """Equal bits: the root is rounded to the dtype before the product."""
    tokens = np.random.default_rng(0).integers(0, case.config.vocabulary, (3, 17))
    table = case.core.get_input_embeddings().to(getattr(torch, dtype))
    theirs = run(table, tokens).float().numpy()
    table.float()
    batch = dataclasses.replace(empty(3, Size(17, 0, 1), case.config.layout), tokens=tokens)
    batch.meta[:, -3:] = [2, 0, 1]  # rows of the other table, which are scaled alike
    rows = np.asarray(case.backbone.embedding[...])[tokens[0]]
    ours = np.asarray(case.backbone.embed(batch, rows, jnp.dtype(dtype)), np.float32)
    np.testing.assert_array_equal(ours[:, :-3], theirs[:, :-3])
    np.testing.assert_array_equal(ours[:, -3:], np.broadcast_to(theirs[0, [2, 0, 1]], ours[:, -3:].shape))


def test_norm(case):
    x_BSD = 3 * values(2, 5, case.config.width)
    np.testing.assert_allclose(case.backbone.final_norm(x_BSD), run(case.core.language_model.norm, x_BSD), **TOLERANCE)


def test_rotary_angles(case):
    positions_BT = np.random.default_rng(0).integers(0, 300, (2, 11))
    expected = run(case.core.language_model.rotary_emb, np.zeros(1, np.float32), positions_BT)
    for ours, theirs in zip(case.backbone.rotary(positions_BT[:, None]), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, **TOLERANCE)


def visible(window=None):
    """Return the keys that each query may see, pair by pair, from the method's description."""
    length = sum(map(sum, ITEMS)) + PADDING
    seen, start = np.eye(length, dtype=bool), 0  # padding sees itself: no empty softmax
    for prompt, meta in ITEMS:
        for query in range(start, start + prompt + meta):
            for key in range(start, start + prompt + meta):
                if query < start + prompt:
                    seen[query, key] = key < start + prompt
                else:
                    seen[query, key] = key <= query and (window is None or query - key < window)
        start += prompt + meta
    return seen[None, None]


@pytest.mark.parametrize("number", [0, 1])
def test_decoder_layer(case, number):
    """Several items and padding. Layer 0 of Gemma 2 is local."""
    language, text = case.core.language_model, case.config.text_config
    segments, is_meta, positions = np.zeros((3, sum(map(sum, ITEMS)) + PADDING), np.int32)
    start = 0
    for segment, (prompt, meta) in enumerate(ITEMS, 1):
        end = start + prompt + meta
        segments[start:end], is_meta[start + prompt : end], positions[start:end] = segment, 1, np.arange(prompt + meta)
        start = end
    x_BSD = values(1, len(segments), case.config.width)
    cos, sin = case.backbone.rotary(positions[None, None])
    local = text.is_gemma2 and number == 0
    layer = jax.jit(layer_of(case.backbone.layers, number))
    ours = layer(x_BSD, local, segments[None], is_meta[None] > 0, cos, sin)
    seen = torch.tensor(visible(text.sliding_window if local else None))
    theirs = run(
        language.layers[number],
        x_BSD,
        attention_mask=torch.where(seen, 0.0, torch.finfo(torch.float32).min),
        position_embeddings=(torch.tensor(np.asarray(cos)), torch.tensor(np.asarray(sin))),
    )
    np.testing.assert_allclose(ours[0, :-PADDING], theirs.numpy()[0, :-PADDING], **TOLERANCE)


def test_items_in_shared_rows_are_as_alone(case):
    """Texts of very different lengths, images in the same row; of Gemma 2 with local layers, whose window cuts items."""
    queries = [{"text": "a red car"}, {"text": "where " * 30, "image": TALL}, {"text": ""}]
    documents = [{"image": WIDE}, {"text": "cloud question " * 20}, {"text": "x", "image": SMALL}]
    process = case.processor
    assert_company_is_unseen(case.network, [*map(process.query, queries)], [*map(process.document, documents)])
