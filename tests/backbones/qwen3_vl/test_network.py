"""Each part of the backbone against the module of transformers that it stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metaembed_jax.backbones.layers import at, normalised
from metaembed_jax.backbones.qwen.network import patch_angles
from metaembed_jax.batch.items import Size
from metaembed_jax.batch.rows import RowItem, collate
from metaembed_jax.checkpoints.loading import load
from metaembed_jax.mesh import make_mesh
from metaembed_jax.network import abstract_network
from tests.backbones.modules import TOLERANCE, layer_of, run
from tests.backbones.qwen2_5_vl.reference import SMALL, TALL, WIDE, Transformers
from tests.backbones.qwen3_vl.reference import reference

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

PICTURES = [TALL, WIDE, SMALL]


class Case:
    """A checkpoint on both sides, and three pictures as each sees them."""

    def __init__(self, name, scratch):
        directory = reference(name, scratch).directory
        config, parameters, processor = load(directory, "float32", make_mesh(devices=jax.devices()[:1]), 0, 1024)
        self.backbone = nnx.merge(abstract_network(config)[0], parameters).backbone
        self.theirs = Transformers(directory)
        examples = [processor.document({"image": picture}) for picture in PICTURES]
        row = Size(64, max(example.patches for example in examples) + 4, 1)
        self.batch = collate([[RowItem(example, 1, 1)] for example in examples], row, config.architecture.layout)
        self.is_patch = self.batch.patch_segments > 0
        self.positions, self.grid = (self.batch.patch_arrays[name] for name in ("patch_positions", "patch_grid"))
        self.seen = self.theirs.images(PICTURES, return_tensors="pt")
        self.visual = self.theirs.model.model.visual

    def flat(self, values_BPD):
        """Rows of our patches without padding: transformers' order."""
        return np.asarray(values_BPD)[self.is_patch]

    def units(self, values_BUD):
        return np.asarray(values_BUD)[self.is_patch[:, ::4]]

    def noise(self, *shape):
        return np.random.default_rng(5).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case("grouped", tmp_path_factory.mktemp("references"))


def test_images_equal_the_pillow_processor(case):
    """The resize, the order of patches, their places; a still image's two frames are equal."""
    vision = case.backbone.config.vision_config
    ours = case.flat(normalised(case.batch.patches, vision.image_mean, vision.image_std))
    frames = case.seen["pixel_values"].numpy().reshape(len(ours), 3, 2, -1)
    for frame in (0, 1):
        np.testing.assert_allclose(ours, frames[:, :, frame].reshape(ours.shape), rtol=0, atol=1e-5)
    vision_utils = pytest.importorskip("transformers.vision_utils")
    positions = vision_utils.get_vision_position_ids(case.seen["image_grid_thw"], 2)
    np.testing.assert_array_equal(case.flat(case.positions), positions)


def test_learned_positions_are_stretched_over_the_grid(case):
    vision_utils = pytest.importorskip("transformers.vision_utils")
    taps = dict(num_grid_per_side=case.visual.num_grid_per_side, mode="bilinear", align_corners=True, spatial_merge_size=2)
    indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(case.seen["image_grid_thw"], **taps)
    with torch.no_grad():
        theirs = (case.visual.pos_embed(indices) * weights[:, :, None]).sum(1)
    ours = case.backbone.vision.learned_positions(case.positions, case.grid)
    np.testing.assert_allclose(case.flat(ours), theirs, **TOLERANCE)


def test_patch_embedding(case):
    tower = case.backbone.vision
    ours = tower.embed_patches(case.batch.patches, case.positions, case.grid, jnp.float32)
    ours = ours - tower.learned_positions(case.positions, case.grid)
    theirs = run(case.visual.patch_embed, case.seen["pixel_values"])
    np.testing.assert_allclose(case.flat(ours), theirs, **TOLERANCE)


def test_vision_rotary_angles(case):
    vision_utils = pytest.importorskip("transformers.vision_utils")
    positions = vision_utils.get_vision_position_ids(case.seen["image_grid_thw"], 2)
    expected = run(case.visual.rotary_pos_emb, case.seen["pixel_values"], positions)
    vision = case.visual.config
    for ours, theirs in zip(patch_angles(case.positions, vision.hidden_size // vision.num_heads), expected, strict=True):
        np.testing.assert_allclose(case.flat(ours), theirs, **TOLERANCE)


def test_vision_block(case):
    vision_utils = pytest.importorskip("transformers.vision_utils")
    vision = case.visual.config
    lengths = vision_utils.get_vision_cu_seqlens(case.seen["image_grid_thw"])
    x_BPD = case.noise(*case.is_patch.shape, vision.hidden_size)
    angles = patch_angles(case.positions, vision.hidden_size // vision.num_heads)
    number = 2
    block = jax.jit(layer_of(case.backbone.vision.blocks, number))
    ours = block(x_BPD, None, case.batch.patch_segments, *angles)
    flat_angles = tuple(torch.tensor(case.flat(angle)) for angle in angles)
    theirs = run(case.visual.blocks[number], case.flat(x_BPD), cu_seqlens=lengths, position_embeddings=flat_angles)
    np.testing.assert_allclose(case.flat(ours), theirs, **TOLERANCE)


def test_mergers(case):
    """The merger of the last states, and those of DeepStack, which norm after concatenation."""
    x_NBPD = case.noise(2, 3, 24, case.visual.config.hidden_size)
    theirs = run(case.visual.merger, x_NBPD[0].reshape(72, -1)).reshape(3, 6, -1)
    np.testing.assert_allclose(case.backbone.vision.merger(x_NBPD[0]), theirs, **TOLERANCE)
    ours = case.backbone.vision.merge_kept(x_NBPD)
    for number, merger in enumerate(case.visual.deepstack_merger_list):
        theirs = run(merger, x_NBPD[number].reshape(72, -1)).reshape(3, 6, -1)
        np.testing.assert_allclose(ours[number], theirs, **TOLERANCE)


def test_whole_vision_tower(case):
    tower = jax.jit(functools.partial(case.backbone.vision, dtype=jnp.float32, checkpoint=False, unroll=1))
    units_BUD, units_NBUD = tower(case.batch)
    theirs = run(case.visual, case.seen["pixel_values"], case.seen["image_grid_thw"])
    np.testing.assert_allclose(case.units(units_BUD), theirs.pooler_output, **TOLERANCE)
    assert len(units_NBUD) == len(theirs.deepstack_features)
    for ours, feature in zip(units_NBUD, theirs.deepstack_features, strict=True):
        np.testing.assert_allclose(case.units(ours), feature, **TOLERANCE)


def test_mrope_angles(case):
    rotary = case.theirs.model.model.language_model.rotary_emb
    positions_B3S = np.random.default_rng(0).integers(0, 300, (2, 3, 11))
    expected = run(rotary, np.zeros(1, np.float32), positions_B3S.swapaxes(0, 1))
    for ours, theirs in zip(case.backbone.rotary(positions_B3S), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, **TOLERANCE)


def test_mrope_positions(case):
    model, tokens, mask = case.theirs.model, torch.tensor(case.batch.tokens).long(), torch.tensor(case.batch.segments > 0)
    kinds = (tokens == model.config.image_token_id).int()
    theirs, _ = model.model.get_rope_index(tokens, kinds, case.seen["image_grid_thw"], attention_mask=mask)
    is_token = np.broadcast_to((case.batch.segments > 0)[:, None], case.batch.positions.shape)
    np.testing.assert_array_equal(case.batch.positions[is_token], theirs.swapaxes(0, 1).numpy()[is_token])


@pytest.mark.parametrize("reads", [None, [[7, 2, 3], [8, 4, 5]]])
def test_decoder_layer(case, reads):
    """Several segments and padding; `reads` computes some positions only. The layer's feature is added, if it has one."""
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
    features_NBSD = case.noise(2, B, S, model.config.hidden_size) + 1
    for number, feature_BSD in enumerate((*features_NBSD, np.zeros_like(x_BSD))):
        added = layer(x_BSD, number, segments_BS, *angles, features_NBSD)
        np.testing.assert_allclose(added, ours + at(jnp.asarray(feature_BSD), reads_BV), **TOLERANCE)
