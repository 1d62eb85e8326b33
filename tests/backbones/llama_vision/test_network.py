"""Each part of Llama-3.2-Vision against the module of transformers that it stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metaembed_jax.backbones.llama_vision.vision import APART, attend_around_padding
from metaembed_jax.batch.items import Size
from metaembed_jax.batch.rows import RowItem, collate
from tests.backbones.llama_vision.reference import (
    CONFIGURATIONS,
    LARGE,
    SMALL,
    TALL,
    WIDE,
    Transformers,
    backbone_of,
    read,
    reference,
    see,
)
from tests.backbones.modules import TOLERANCE, layer_of, run

torch = pytest.importorskip("torch")
modeling = pytest.importorskip("transformers.models.mllama.modeling_mllama")

PICTURES = [TALL, WIDE, SMALL, LARGE]


class Case:
    """A checkpoint on both sides, and pictures as each sees them: ours in two rows, behind each other and behind a text."""

    def __init__(self, name, scratch):
        directory = reference(name, scratch).directory
        model, self.theirs = read(directory), Transformers(directory)
        self.backbone = backbone_of(model)
        self.vision, self.tower = self.theirs.model.model.vision_model, self.backbone.vision
        items = [RowItem(model.processor.document({"image": picture}), 1, 1) for picture in PICTURES]
        rows = [items[:2], [RowItem(model.processor.document({"text": "a"}), 1, 1), *items[2:]]]
        row = Size(200, 3 * items[0].size.patches, 3)
        self.batch = collate(rows, row, model.config.architecture.layout)
        self.images = [0, 1, 3, 4]  # of the six that rows have room for
        self.segments = [1, 2, 2, 3]
        self.seen = see(self.theirs.images, [{"image": picture} for picture in PICTURES])
        self.counts = [count for [count] in self.seen.pop("num_tiles")]
        self.ratios = self.seen["aspect_ratio_ids"]

    def noise(self, *shape):
        return np.random.default_rng(5).normal(size=shape).astype(np.float32)

    def padding(self):
        """[B, M * Q], of a tile's tokens and what fills them up, and transformers' mask for it."""
        config = self.vision.config
        tokens = self.vision.num_patches
        filled = -(-tokens // 8) * 8
        padding = np.ones((len(PICTURES), config.max_num_tiles, filled), bool)
        for row, count in enumerate(self.counts):
            padding[row, :count, :tokens] = False
        mask = modeling._prepare_aspect_ratio_attention_mask(self.seen["aspect_ratio_mask"][:, 0], tokens, filled, torch.float32)
        return padding.reshape(len(PICTURES), -1), mask


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("references"))


def test_patch_embedding(case):
    """Patches of all tiles, in order; what transformers pads with embeds to nothing, and so do images that are not there."""
    patches_JPX = case.batch.patches.reshape(6, -1, case.batch.patches.shape[-1])
    is_image_JP = case.batch.patch_segments.reshape(6, -1) > 0
    ours = np.asarray(case.tower.embed_patches(patches_JPX, is_image_JP, jnp.float32))
    pixels = case.seen["pixel_values"]
    theirs = run(case.vision.patch_embedding, pixels.flatten(0, 2)).flatten(2).transpose(1, 2)
    np.testing.assert_allclose(ours[case.images], theirs.reshape(len(PICTURES), -1, ours.shape[-1]), **TOLERANCE)
    assert not np.delete(ours, case.images, axis=0).any()


@pytest.mark.parametrize("name, theirs", [("before_tiles", "pre_tile"), ("after_tiles", "post_tile")])
def test_tile_embedding(case, name, theirs):
    config = case.vision.config
    x_BMND = case.noise(len(PICTURES), config.max_num_tiles, 7, config.hidden_size)
    module = getattr(case.vision, f"{theirs}_positional_embedding")
    expected = run(module, x_BMND, case.ratios)
    np.testing.assert_allclose(getattr(case.tower, name)(x_BMND, case.ratios[:, 0].numpy()), expected, **TOLERANCE)


def test_position_embedding(case):
    config = case.vision.config
    x_BMND = case.noise(len(PICTURES), config.max_num_tiles, case.vision.num_patches, config.hidden_size)
    expected = run(case.vision.gated_positional_embedding, x_BMND, case.ratios)
    closed = 1 - jnp.tanh(case.tower.tile_positions.gate[...])
    ours = case.tower.tile_positions(x_BMND + closed * case.tower.position_embedding[...], case.ratios[:, 0].numpy())
    np.testing.assert_allclose(ours, expected, **TOLERANCE)


def test_embedding_of_tiles(case):
    """Tile embedding, class token, positions and norm, one after the other."""
    config = case.vision.config
    tiles_JMPD = case.noise(len(PICTURES), config.max_num_tiles, case.vision.num_patches - 1, config.hidden_size)
    with torch.no_grad():
        tiles = case.vision.pre_tile_positional_embedding(torch.tensor(tiles_JMPD), case.ratios)
        tiles = case.vision.apply_class_embedding(tiles.flatten(0, 1)).unflatten(0, (len(PICTURES), -1))
        expected = case.vision.layernorm_pre(case.vision.gated_positional_embedding(tiles, case.ratios))
    patches_JPD = tiles_JMPD.reshape(len(PICTURES), -1, config.hidden_size)
    np.testing.assert_allclose(case.tower.embed(patches_JPD, case.ratios[:, 0].numpy()), expected, **TOLERANCE)


@pytest.mark.parametrize("ours, theirs", [("layers", "transformer"), ("global_layers", "global_transformer")])
def test_vision_layer(case, ours, theirs):
    padding_BQ, mask = case.padding()
    x_BQD = case.noise(*padding_BQ.shape, case.vision.config.hidden_size)
    number = getattr(case.tower, ours).query.kernel.shape[0] - 1
    expected = run(getattr(case.vision, theirs).layers[number], x_BQD, attention_mask=mask)
    states = jax.jit(layer_of(getattr(case.tower, ours), number))(x_BQD, None, padding_BQ)
    np.testing.assert_allclose(states, expected, **TOLERANCE)


def test_whole_vision_tower(case):
    """The whole tower, with the projector and the states of the layers between."""
    tower = jax.jit(functools.partial(case.tower, dtype=jnp.float32, checkpoint=True, unroll=1))
    states_BTD, segments_BT = map(np.asarray, tower(case.batch))
    with torch.no_grad():
        states = case.theirs.model.model.multi_modal_projector(case.vision(**case.seen).last_hidden_state)[:, 0].numpy()
    states_JTD, segments_JT = (x.reshape(6, -1, *x.shape[2:]) for x in (states_BTD, segments_BT))
    for image, segment, count, expected in zip(case.images, case.segments, case.counts, states, strict=True):
        expected = expected[:count].reshape(-1, states.shape[-1])
        np.testing.assert_allclose(states_JTD[image, : len(expected)], expected, **TOLERANCE)
        assert (segments_JT[image] == segment * (np.arange(segments_JT.shape[1]) < len(expected))).all()
    assert np.isfinite(states_BTD).all() and not np.delete(segments_JT, case.images, axis=0).any()


def test_tokens_have_an_image_as_their_item_has(case):
    segments_BS = case.batch.segments
    expected = (segments_BS > 0) & (segments_BS > np.array([[0], [1]]))
    np.testing.assert_array_equal(case.backbone.has_image(case.batch)[..., 0], expected)


def test_rotary_angles(case):
    rotary = case.theirs.model.model.language_model.rotary_emb
    positions_BS = np.stack([np.arange(300), np.concatenate([np.arange(41), np.arange(259)])])
    expected = run(rotary, np.zeros(1, np.float32), positions_BS)
    for ours, theirs in zip(case.backbone.rotary(positions_BS[:, None]), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)  # an angle of 300 is 3e-5 from the next one


SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 0], [1, 1, 1, 1, 2, 3, 3, 3, 3], [1, 1, 2, 2, 0, 0, 0, 0, 0]])


def context(case):
    """A text's states and what layers read of it: segments and angles."""
    positions_BS = np.random.default_rng(0).integers(0, 50, SEGMENTS.shape)
    model = case.theirs.model.model.language_model
    return case.noise(*SEGMENTS.shape, model.config.hidden_size), (SEGMENTS, *case.backbone.rotary(positions_BS[:, None])), model


def layer_and_kind(case, number):
    (is_crossing_L, states), graph = case.backbone.flags(), nnx.split(case.backbone.crossing)[0]
    layer = layer_of(case.backbone.layers, number)
    kind = is_crossing_L[number], jax.tree.map(lambda x: x[number], states)
    return jax.jit(lambda x, text, image: layer(x, kind, graph, text, image))


@pytest.mark.parametrize("with_image", [False, True])
def test_layer_over_text(case, with_image):
    x_BSD, text, model = context(case)
    number = min(set(range(model.config.num_hidden_layers)) - set(model.config.cross_attention_layers))
    visible = np.tril(np.ones((SEGMENTS.shape[1],) * 2, bool)) & (SEGMENTS[:, :, None] == SEGMENTS[:, None])
    expected = run(
        model.layers[number],
        x_BSD,
        attention_mask=torch.tensor(visible[:, None]),
        position_embeddings=tuple(torch.tensor(np.asarray(angle)) for angle in text[1:]),
    )
    image = (case.noise(3, 20, x_BSD.shape[-1]), np.ones((3, 20), int), SEGMENTS[..., None] == 1) if with_image else None
    np.testing.assert_allclose(layer_and_kind(case, number)(x_BSD, text, image), expected, **TOLERANCE)


def test_layer_over_image(case):
    """Images of some of their tiles, in shared rows; items without an image pass as if there were no such layer."""
    x_BSD, text, model = context(case)
    number, tokens = model.config.cross_attention_layers[-1], 4
    tiles_BI = np.array([[2, 2, 0, 1], [3, 3, 3, 0], [0, 0, 0, 0]])
    states_BTD = case.noise(3, 4 * tokens, x_BSD.shape[-1])
    looks = (SEGMENTS[:, :, None] == tiles_BI[:, None]) & (SEGMENTS > 0)[..., None]
    mask, full_rows = modeling._prepare_cross_attention_mask(torch.tensor(looks[:, :, None]).long(), tokens, torch.float32)
    expected = run(
        model.layers[number],
        x_BSD,
        states_BTD,
        cross_attention_mask=mask,
        attention_mask=None,
        full_text_row_masked_out_mask=full_rows,
    ).numpy()
    has_image = looks.any(axis=2)
    expected[~has_image] = x_BSD[~has_image]
    image = states_BTD, np.repeat(tiles_BI, tokens, axis=1), has_image[..., None]
    np.testing.assert_allclose(layer_and_kind(case, number)(x_BSD, text, image), expected, **TOLERANCE)
    np.testing.assert_array_equal(layer_and_kind(case, number)(x_BSD, text, None), x_BSD)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_only_padding_does_not_see_padding(dtype, tolerance):
    """The additional number of heads, against a mask; also for scores larger than real ones."""
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(2, 12, 3, 8)) * size, dtype) for size in (4, 4, 1))
    padding_BQ = rng.random((2, 12)) < 0.5
    assert jnp.asarray(APART, dtype) == APART
    mask = ~(padding_BQ[:, None, :, None] & padding_BQ[:, None, None, :])
    expected = jax.nn.dot_product_attention(query, key, value, mask=mask)
    mixed = attend_around_padding(query, key, value, padding_BQ)
    np.testing.assert_allclose(np.asarray(mixed, np.float32), np.asarray(expected, np.float32), rtol=0, atol=tolerance)
