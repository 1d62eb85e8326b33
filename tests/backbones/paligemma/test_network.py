"""Each part of PaliGemma against the module of transformers that it stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from metaembed_jax.backbones.paligemma.network import positions
from metaembed_jax.checkpoints.loading import load
from metaembed_jax.inputs.examples import ShapeClass, collate
from metaembed_jax.network import abstract_network
from metaembed_jax.sharding import make_mesh
from tests.backbones.modules import TOLERANCE, layer_of, run
from tests.backbones.paligemma.reference import Transformers, reference
from tests.backbones.qwen2_5_vl.reference import SMALL, TALL, WIDE, noise

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

PICTURES = [TALL, WIDE, SMALL]
S, ROWS = 9, 31  # prompt tokens and appended rows: together more than the window of 24


class Case:
    """A checkpoint on both sides, and three pictures as each sees them."""

    def __init__(self, name, scratch):
        directory = reference(name, scratch).directory
        network, parameters, self.processor = load(directory, "float32", make_mesh(devices=jax.devices()[:1]), 0, 1024)
        self.config, self.backbone = network.architecture, nnx.merge(abstract_network(network)[0], parameters).backbone
        self.theirs = Transformers(directory)
        self.core = self.theirs.model.model
        examples = [self.processor.candidate({"image": picture}) for picture in PICTURES]
        self.batch = collate(examples, ShapeClass(64, self.config.patch_multiple), self.config.layout)
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
        patches = case.processor.candidate({"image": picture}).patch_arrays["patches"]
        vision = case.config.vision_config
        side, size = vision.image_size // vision.patch_size, vision.patch_size
        square = patches.reshape(side, side, 3, size, size).transpose(2, 0, 3, 1, 4).reshape(theirs.shape)
        mean, std = (np.asarray(x)[:, None, None] for x in (vision.image_mean, vision.image_std))
        np.testing.assert_allclose((square / 255 - mean) / std, theirs, rtol=0, atol=1e-5)


def test_patch_embedding(case):
    ours = case.backbone.vision.embed_patches(case.batch["patches"], jnp.float32)
    np.testing.assert_allclose(ours, run(case.core.vision_tower.embeddings, case.pixels), **TOLERANCE)


def test_vision_block(case):
    x_BPD = values(2, case.config.patch_multiple, case.config.vision_config.hidden_size)
    ours = jax.jit(layer_of(case.backbone.vision.blocks, 1))(x_BPD, None)
    theirs = run(case.core.vision_tower.encoder.layers[1], x_BPD, attention_mask=None)
    np.testing.assert_allclose(ours, theirs, **TOLERANCE)


def test_vision_tower_and_projector(case):
    tower = jax.jit(functools.partial(case.backbone.vision, dtype=jnp.float32, checkpoint=False, unroll=1))
    theirs = run(case.core.get_image_features, case.pixels).pooler_output
    np.testing.assert_allclose(tower(case.batch["patches"]), theirs, **TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scaled_embedding(case, dtype):
    """To the bit: the root is rounded to the dtype before it is multiplied with."""
    tokens = np.random.default_rng(0).integers(0, case.config.vocabulary, (3, 17))
    table = case.core.get_input_embeddings().to(getattr(torch, dtype))
    theirs = run(table, tokens).float().numpy()
    table.float()
    ours = case.backbone.embed({"tokens": tokens}, jnp.dtype(dtype), False, 1)
    np.testing.assert_array_equal(np.asarray(ours, np.float32), theirs)


def test_norm(case):
    x_BSD = 3 * values(2, 5, case.config.width)
    np.testing.assert_allclose(case.backbone.final_norm(x_BSD), run(case.core.language_model.norm, x_BSD), **TOLERANCE)


def test_rotary_angles(case):
    positions_BT = np.random.default_rng(0).integers(0, 300, (2, 11))
    expected = run(case.core.language_model.rotary_emb, np.zeros(1, np.float32), positions_BT)
    for ours, theirs in zip(case.backbone.rotary(positions_BT), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, **TOLERANCE)


def visible(mask_BT, window=None):
    """Which keys a query may see, pair by pair, as the method's description has it."""
    B, T = mask_BT.shape
    seen = np.zeros((B, 1, T, T), bool)
    for query in range(T):
        for key in range(T):
            in_prefix = query < T - ROWS and key < T - ROWS
            behind = key <= query and (window is None or query - key < window)
            seen[:, 0, query, key] = mask_BT[:, key] & (in_prefix or behind)
    return seen


@pytest.mark.parametrize("number", [0, 1])
def test_decoder_layer(case, number):
    """With left padding. Layer 0 of Gemma 2 is local."""
    language, text = case.core.language_model, case.config.text_config
    x_BTD = values(2, S + ROWS, case.config.width)
    mask_BT = np.arange(S + ROWS) >= np.array([[0], [4]])
    cos, sin = case.backbone.rotary(positions(mask_BT))
    local = text.is_gemma2 and number == 0
    ours = jax.jit(functools.partial(layer_of(case.backbone.layers, number), rows=ROWS))(x_BTD, local, mask_BT, cos, sin)
    seen = visible(mask_BT, text.sliding_window if local else None)
    theirs = run(
        language.layers[number],
        x_BTD,
        attention_mask=torch.where(torch.tensor(seen), 0.0, torch.finfo(torch.float32).min),
        position_embeddings=(torch.tensor(np.asarray(cos)), torch.tensor(np.asarray(sin))),
    )
    np.testing.assert_allclose(np.asarray(ours)[mask_BT], theirs.numpy()[mask_BT], **TOLERANCE)


def test_positions_count_from_one_behind_padding():
    mask_BT = np.array([[True] * 5, [False, False, True, True, True]])
    np.testing.assert_array_equal(positions(jnp.asarray(mask_BT)), [[1, 2, 3, 4, 5], [0, 0, 1, 2, 3]])
