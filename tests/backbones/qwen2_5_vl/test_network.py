"""Each part of the backbone against the module of transformers that it stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metaembed_jax.backbones.layers import at
from metaembed_jax.backbones.qwen.network import patch_angles
from metaembed_jax.batch.items import Size
from metaembed_jax.batch.rows import RowItem, collate
from metaembed_jax.checkpoints.loading import load
from metaembed_jax.mesh import make_mesh
from metaembed_jax.network import abstract_network
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
        self.examples = [self.processor.document({"image": picture}) for picture in PICTURES]
        self.rasters = [example.visual[example.visual >= 0] for example in self.examples]
        row = Size(64, max(example.patches for example in self.examples), 1)
        self.batch = collate([[RowItem(example, 1, 1)] for example in self.examples], row, config.architecture.layout)
        self.is_patch = self.batch.patch_segments > 0
        self.positions = self.batch.patch_arrays["patch_positions"]
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

    def in_window_order(self, values_BPD, index):
        """Rows of our patches in the order inside of transformers' vision tower; `index` names its units in raster order."""
        return self.in_raster_order(values_BPD).reshape(len(index), 4, -1)[index].reshape(4 * len(index), -1)

    def noise(self, *shape):
        return np.random.default_rng(5).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case("grouped", tmp_path_factory.mktemp("references"))


def test_patch_embedding(case):
    ours = case.backbone.vision.embed_patches(case.batch.patches, jnp.float32)
    theirs = run(case.theirs.model.model.visual.patch_embed, case.seen["pixel_values"])
    np.testing.assert_allclose(case.in_raster_order(ours), theirs, **TOLERANCE)


def test_vision_rotary_angles(case):
    vision_utils = pytest.importorskip("transformers.vision_utils")
    positions = vision_utils.get_vision_position_ids(case.seen["image_grid_thw"], 2)
    expected = run(case.theirs.model.model.visual.rotary_pos_emb, case.seen["pixel_values"], positions)
    for ours, theirs in zip(patch_angles(case.positions, case.vision_head), expected, strict=True):
        np.testing.assert_allclose(case.in_raster_order(ours), theirs, **TOLERANCE)


@pytest.mark.parametrize("full", [False, True])
def test_vision_block(case, full):
    vision_utils = pytest.importorskip("transformers.vision_utils")
    visual, grid = case.theirs.model.model.visual, case.seen["image_grid_thw"]
    index, bounds = vision_utils.get_vision_window_index(grid, 2, visual.window_size, 14)
    lengths = vision_utils.get_vision_cu_seqlens(grid) if full else torch.unique_consecutive(torch.as_tensor(bounds))
    x_BPD = case.noise(*case.is_patch.shape, visual.config.hidden_size)
    angles = patch_angles(case.positions, case.vision_head)
    context = case.batch.patch_segments, case.batch.patch_arrays["windows"]
    number = 2
    ours = jax.jit(layer_of(case.backbone.vision.blocks, number))(x_BPD, full, *context, *angles)
    flat_angles = tuple(torch.tensor(case.in_window_order(angle, index)) for angle in angles)
    theirs = run(visual.blocks[number], case.in_window_order(x_BPD, index), cu_seqlens=lengths, position_embeddings=flat_angles)
    np.testing.assert_allclose(case.in_window_order(ours, index), theirs, **TOLERANCE)


def test_merger(case):
    visual = case.theirs.model.model.visual
    x_BPD = case.noise(2, 24, visual.config.hidden_size)
    theirs = run(visual.merger, x_BPD.reshape(48, -1)).reshape(2, 6, -1)
    np.testing.assert_allclose(case.backbone.vision.merge(x_BPD), theirs, **TOLERANCE)


def test_whole_vision_tower(case):
    tower = jax.jit(functools.partial(case.backbone.vision, dtype=jnp.float32, checkpoint=False, unroll=1))
    units_BUD = tower(case.batch)
    ours = np.concatenate([units[raster] for units, raster in zip(units_BUD, case.rasters, strict=True)])
    theirs = run(case.theirs.model.model.visual, case.seen["pixel_values"], case.seen["image_grid_thw"]).pooler_output
    np.testing.assert_allclose(ours, theirs, **TOLERANCE)


def test_mrope_angles(case):
    rotary = case.theirs.model.model.language_model.rotary_emb
    positions_B3S = np.random.default_rng(0).integers(0, 300, (2, 3, 11))
    expected = run(rotary, np.zeros(1, np.float32), positions_B3S.swapaxes(0, 1))
    for ours, theirs in zip(case.backbone.rotary(positions_B3S), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize("reads", [None, [[7, 2, 3], [8, 4, 5]]])
def test_decoder_layer(case, reads):
    """Several segments and padding; `reads` computes some positions only."""
    model = case.theirs.model.model.language_model
    B, S = 2, 9
    x_BSD = case.noise(B, S, model.config.hidden_size)
    segments_BS = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 0], [1, 1, 1, 1, 2, 3, 3, 3, 3]])
    positions_B3S = np.random.default_rng(0).integers(0, 50, (B, 3, S))
    angles = case.backbone.rotary(positions_B3S)
    reads_BV = None if reads is None else np.array(reads)
    layer = jax.jit(functools.partial(layer_of(case.backbone.layers, 0), reads_BV=reads_BV))
    ours = layer(x_BSD, None, segments_BS, *angles)
    visible = np.tril(np.ones((S, S), bool)) & (segments_BS[:, :, None] == segments_BS[:, None])
    theirs = run(
        model.layers[0],
        x_BSD,
        attention_mask=torch.tensor(visible[:, None]),
        position_embeddings=tuple(torch.tensor(np.asarray(angle)) for angle in angles),
    )
    theirs = at(jnp.asarray(theirs.numpy()), reads_BV)
    np.testing.assert_allclose(ours, theirs, **TOLERANCE)
