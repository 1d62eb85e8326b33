"""Each part of the backbone against the module of transformers that it stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metaembed_jax.backbones.qwen.images import patchify
from metaembed_jax.backbones.qwen.network import extend_positions, patch_angles
from metaembed_jax.checkpoints.loading import load
from metaembed_jax.inputs.examples import ShapeClass, collate
from metaembed_jax.network import abstract_network
from metaembed_jax.sharding import make_mesh
from tests.backbones.modules import TOLERANCE, layer_of, run
from tests.backbones.qwen2_5_vl.reference import SMALL, TALL, WIDE, Transformers, reference

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

PICTURES = [TALL, WIDE, SMALL]


class Case:
    """A checkpoint on both sides, and three pictures as each sees them."""

    def __init__(self, name, scratch):
        directory = reference(name, scratch).directory
        config, parameters, self.processor = load(directory, "float32", make_mesh(devices=jax.devices()[:1]), 0, 1024)
        self.backbone = nnx.merge(abstract_network(config)[0], parameters).backbone
        self.theirs = Transformers(directory)
        self.examples = [self.processor.candidate({"image": picture}) for picture in PICTURES]
        self.rasters = [patchify(picture, self.processor.images).raster for picture in PICTURES]
        shape = ShapeClass(64, max(example.patches for example in self.examples))
        self.batch = collate(self.examples, shape, config.architecture.layout)
        vision = config.architecture.vision_config
        self.vision_head = vision.hidden_size // vision.num_heads
        self.seen = self.theirs.images(PICTURES, return_tensors="pt")

    def in_raster_order(self, values_BPD):
        """Rows of our patches in the order in which transformers' processor gives them."""
        return np.concatenate(
            [
                np.asarray(values).reshape(-1, 4, values.shape[-1])[raster].reshape(-1, values.shape[-1])
                for values, raster in zip(values_BPD, self.rasters, strict=True)
            ]
        )

    def in_window_order(self, values_BPD):
        """Rows of our patches without padding: the order inside of transformers' vision tower."""
        return np.asarray(values_BPD)[self.batch["patch_mask"]]

    def noise(self, *shape):
        return np.random.default_rng(5).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case("grouped", tmp_path_factory.mktemp("references"))


def test_patch_embedding(case):
    ours = case.backbone.vision.embed_patches(case.batch["patches"], jnp.float32)
    theirs = run(case.theirs.model.model.visual.patch_embed, case.seen["pixel_values"])
    np.testing.assert_allclose(case.in_raster_order(ours), theirs, **TOLERANCE)


def test_vision_rotary_angles(case):
    vision_utils = pytest.importorskip("transformers.vision_utils")
    positions = vision_utils.get_vision_position_ids(case.seen["image_grid_thw"], 2)
    expected = run(case.theirs.model.model.visual.rotary_pos_emb, case.seen["pixel_values"], positions)
    for ours, theirs in zip(patch_angles(case.batch["patch_positions"], case.vision_head), expected, strict=True):
        np.testing.assert_allclose(case.in_raster_order(ours), theirs, **TOLERANCE)


@pytest.mark.parametrize("full", [False, True])
def test_vision_block(case, full):
    vision_utils = pytest.importorskip("transformers.vision_utils")
    visual, grid = case.theirs.model.model.visual, case.seen["image_grid_thw"]
    if full:
        lengths = vision_utils.get_vision_cu_seqlens(grid)
    else:
        lengths = torch.unique_consecutive(vision_utils.get_vision_window_index(grid, 2, visual.window_size, 14)[1])
    x_BPD = case.noise(*case.batch["patch_mask"].shape, visual.config.hidden_size)
    angles = patch_angles(case.batch["patch_positions"], case.vision_head)
    number = 2
    ours = jax.jit(layer_of(case.backbone.vision.blocks, number))(x_BPD, full, case.batch["patch_mask"], *angles)
    flat_angles = tuple(torch.tensor(case.in_window_order(angle)) for angle in angles)
    theirs = run(visual.blocks[number], case.in_window_order(x_BPD), cu_seqlens=lengths, position_embeddings=flat_angles)
    np.testing.assert_allclose(case.in_window_order(ours), theirs, **TOLERANCE)


def test_merger(case):
    visual = case.theirs.model.model.visual
    x_BPD = case.noise(2, 24, visual.config.hidden_size)
    theirs = run(visual.merger, x_BPD.reshape(48, -1)).reshape(2, 6, -1)
    np.testing.assert_allclose(case.backbone.vision.merge(x_BPD), theirs, **TOLERANCE)


def test_whole_vision_tower(case):
    tower = jax.jit(functools.partial(case.backbone.vision, dtype=jnp.float32, checkpoint=False, unroll=1))
    units_BUD = tower(*(case.batch[key] for key in ("patches", "patch_positions", "patch_mask")))
    ours = np.concatenate([units[raster] for units, raster in zip(units_BUD, case.rasters, strict=True)])
    theirs = run(case.theirs.model.model.visual, case.seen["pixel_values"], case.seen["image_grid_thw"]).pooler_output
    np.testing.assert_allclose(ours, theirs, **TOLERANCE)


def test_mrope_angles(case):
    rotary = case.theirs.model.model.language_model.rotary_emb
    positions_B3S = np.random.default_rng(0).integers(0, 300, (2, 3, 11))
    expected = run(rotary, np.zeros(1, np.float32), positions_B3S.swapaxes(0, 1))
    for ours, theirs in zip(case.backbone.rotary(positions_B3S), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize("keep", [0, 3])
def test_decoder_layer(case, keep):
    """With left padding; `keep` computes the last rows only."""
    model = case.theirs.model.model.language_model
    B, S = 2, 9
    x_BSD = case.noise(B, S, model.config.hidden_size)
    mask_BS = np.arange(S) >= np.array([[0], [4]])
    positions_B3S = np.random.default_rng(0).integers(0, 50, (B, 3, S))
    angles = case.backbone.rotary(positions_B3S)
    layer = jax.jit(functools.partial(layer_of(case.backbone.layers, 0), keep=keep))
    ours = layer(x_BSD, None, mask_BS, *angles)
    visible = np.tril(np.ones((S, S), bool)) & mask_BS[:, None, None, :]
    theirs = run(
        model.layers[0],
        x_BSD,
        attention_mask=torch.tensor(visible) | torch.eye(S, dtype=torch.bool),  # a row of padding sees itself: no empty softmax
        position_embeddings=tuple(torch.tensor(np.asarray(angle)) for angle in angles),
    )
    kept = mask_BS[:, -keep:]
    np.testing.assert_allclose(np.asarray(ours)[kept], theirs.numpy()[:, -keep:][kept], **TOLERANCE)


def test_appended_rows_count_on_as_text():
    positions_B3S = np.array([[[0, 1, 1, 1, 4], [0, 1, 2, 3, 4], [0, 1, 1, 1, 4]], [[0, 0, 0, 1, 2]] * 3])
    extended = np.asarray(extend_positions(jnp.asarray(positions_B3S), 3))
    np.testing.assert_array_equal(extended[:, :, :5], positions_B3S)
    np.testing.assert_array_equal(extended[:, :, 5:], np.array([[[5, 6, 7]] * 3, [[3, 4, 5]] * 3]))
