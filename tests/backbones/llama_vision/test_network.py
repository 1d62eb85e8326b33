"""Each part of Llama-3.2-Vision against the module of transformers that it stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaembed_jax.backbones.llama_vision.vision import APART, attend_around_padding
from metaembed_jax.inputs.examples import ShapeClass, collate
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
    """A checkpoint on both sides, and pictures as each sees them."""

    def __init__(self, name, scratch):
        directory = reference(name, scratch).directory
        model, self.theirs = read(directory), Transformers(directory)
        self.backbone = backbone_of(model)
        self.vision, self.tower = self.theirs.model.model.vision_model, self.backbone.vision
        examples = [model.processor.candidate({"image": picture}) for picture in PICTURES]
        most = max(example.patches for example in examples)
        self.batch = collate(examples, ShapeClass(64, most), model.config.architecture.layout)
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
    """Of all tiles, in order; what transformers pads with embeds to nothing."""
    aspect_ratio_BP = case.batch["aspect_ratio"]
    ours = np.asarray(case.tower.embed_patches(case.batch["patches"], aspect_ratio_BP > 0, jnp.float32))
    pixels = case.seen["pixel_values"]
    theirs = run(case.vision.patch_embedding, pixels.flatten(0, 2)).flatten(2).transpose(1, 2)
    theirs = theirs.reshape(len(PICTURES), -1, ours.shape[-1]).numpy()
    np.testing.assert_allclose(ours, theirs[:, : ours.shape[1]], **TOLERANCE)
    assert not theirs[:, ours.shape[1] :].any()


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
    patches_BPD = case.noise(len(PICTURES), 2 * (case.vision.num_patches - 1), config.hidden_size)
    tiles = torch.zeros(len(PICTURES), config.max_num_tiles, case.vision.num_patches - 1, config.hidden_size)
    tiles[:, :2] = torch.tensor(patches_BPD).reshape(len(PICTURES), 2, -1, config.hidden_size)
    with torch.no_grad():
        tiles = case.vision.pre_tile_positional_embedding(tiles, case.ratios)
        tiles = case.vision.apply_class_embedding(tiles.flatten(0, 1)).unflatten(0, (len(PICTURES), -1))
        expected = case.vision.layernorm_pre(case.vision.gated_positional_embedding(tiles, case.ratios))
    np.testing.assert_allclose(case.tower.embed(patches_BPD, case.ratios[:, 0].numpy()), expected, **TOLERANCE)


@pytest.mark.parametrize("ours, theirs", [("layers", "transformer"), ("global_layers", "global_transformer")])
def test_vision_layer(case, ours, theirs):
    padding_BQ, mask = case.padding()
    x_BQD = case.noise(*padding_BQ.shape, case.vision.config.hidden_size)
    number = getattr(case.tower, ours).query.kernel.shape[0] - 1
    expected = run(getattr(case.vision, theirs).layers[number], x_BQD, attention_mask=mask)
    found = jax.jit(layer_of(getattr(case.tower, ours), number))(x_BQD, None, padding_BQ)
    np.testing.assert_allclose(found, expected, **TOLERANCE)


def test_whole_vision_tower(case):
    """With the projector, and the states of the layers between."""
    tower = jax.jit(functools.partial(case.tower, dtype=jnp.float32, checkpoint=True, unroll=1))
    found, is_image_BT = map(np.asarray, tower(case.batch["patches"], case.batch["aspect_ratio"]))
    with torch.no_grad():
        states = case.theirs.model.model.multi_modal_projector(case.vision(**case.seen).last_hidden_state)[:, 0].numpy()
    assert is_image_BT.sum(axis=1).tolist() == [count * case.vision.num_patches for count in case.counts]
    for row, count in enumerate(case.counts):
        expected = states[row, :count].reshape(-1, states.shape[-1])
        np.testing.assert_allclose(found[row, : len(expected)], expected, **TOLERANCE)


def test_rotary_angles(case):
    """Positions count without padding."""
    rotary = case.theirs.model.model.language_model.rotary_emb
    mask_BS = np.arange(300) >= np.array([[0], [41]])
    positions_BS = np.maximum(np.arange(300) - np.array([[0], [41]]), 0)
    expected = run(rotary, np.zeros(1, np.float32), positions_BS)
    for ours, theirs in zip(case.backbone.rotary(mask_BS), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)  # an angle of 300 is 3e-5 from the next one


def context(case):
    """A text's states and what layers read of it: mask with left padding, angles."""
    B, S, model = 3, 9, case.theirs.model.model.language_model
    mask_BS = np.arange(S) >= np.array([[0], [4], [2]])
    return case.noise(B, S, model.config.hidden_size), mask_BS, case.backbone.rotary(mask_BS), model


def layer_and_kind(case, number):
    (is_crossing_L, states), graph = case.backbone.kinds()
    layer = layer_of(case.backbone.layers, number)
    kind = is_crossing_L[number], jax.tree.map(lambda x: x[number], states)
    return jax.jit(lambda x, text, image: layer(x, kind, graph, text, image))


@pytest.mark.parametrize("with_image", [False, True])
def test_layer_over_text(case, with_image):
    x_BSD, mask_BS, angles, model = context(case)
    number = min(set(range(model.config.num_hidden_layers)) - set(model.config.cross_attention_layers))
    S = mask_BS.shape[1]
    visible = np.tril(np.ones((S, S), bool)) & mask_BS[:, None, None, :]
    expected = run(
        model.layers[number],
        x_BSD,
        attention_mask=torch.tensor(visible) | torch.eye(S, dtype=torch.bool),  # a row of padding sees itself: no empty softmax
        position_embeddings=tuple(torch.tensor(np.asarray(angle)) for angle in angles),
    )
    image = (case.noise(3, 20, x_BSD.shape[-1]), np.ones((3, 20), bool)) if with_image else None
    found = np.asarray(layer_and_kind(case, number)(x_BSD, (mask_BS, *angles), image))
    np.testing.assert_allclose(found[mask_BS], expected.numpy()[mask_BS], **TOLERANCE)


def test_layer_over_image(case):
    """An image of some of its tiles, one of all, and a row without, which passes as if there were no such layer."""
    x_BSD, mask_BS, angles, model = context(case)
    number, tokens = model.config.cross_attention_layers[-1], 4
    tiles = np.array([1, 3, 0])
    states_BTD = case.noise(3, 3 * tokens, x_BSD.shape[-1])
    image_mask_BT = np.arange(3 * tokens) < tokens * tiles[:, None]
    looks = torch.tensor(np.arange(3) < tiles[:, None])[:, None, None].expand(-1, mask_BS.shape[1], -1, -1).long()
    mask, full_rows = modeling._prepare_cross_attention_mask(looks, tokens, torch.float32)
    expected = run(
        model.layers[number],
        x_BSD,
        states_BTD,
        cross_attention_mask=mask,
        attention_mask=None,
        full_text_row_masked_out_mask=full_rows,
    ).numpy()
    expected[2] = x_BSD[2]
    found = layer_and_kind(case, number)(x_BSD, (mask_BS, *angles), (states_BTD, image_mask_BT))
    np.testing.assert_allclose(found, expected, **TOLERANCE)
    np.testing.assert_array_equal(layer_and_kind(case, number)(x_BSD, (mask_BS, *angles), None), x_BSD)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_only_padding_does_not_see_padding(dtype, tolerance):
    """The number that heads get more, against a mask; also for scores as large as they never are."""
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(2, 12, 3, 8)) * size, dtype) for size in (4, 4, 1))
    padding_BQ = rng.random((2, 12)) < 0.5
    assert jnp.asarray(APART, dtype) == APART
    mask = ~(padding_BQ[:, None, :, None] & padding_BQ[:, None, None, :])
    expected = jax.nn.dot_product_attention(query, key, value, mask=mask)
    found = attend_around_padding(query, key, value, padding_BQ)
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(expected, np.float32), rtol=0, atol=tolerance)
