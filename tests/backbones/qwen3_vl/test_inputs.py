"""Prompts against the strings of the recipe tokenized whole, and images against transformers' Pillow processor."""

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from metaembed_jax.backbones.qwen3_vl import FAMILY as QWEN3_VL
from metaembed_jax.batch.items import Limits, Size
from metaembed_jax.batch.rows import RowItem, collate
from tests.backbones.qwen2_5_vl.reference import string, write_tokenizer
from tests.backbones.qwen3_vl.test_config import RELEASED

CONFIG = QWEN3_VL.Config.from_huggingface(RELEASED)
# As the 2B model is released.
PREPROCESSOR = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}  # fmt: skip
SMALL = PREPROCESSOR | {"size": {"longest_edge": 40 * 1024, "shortest_edge": 4 * 1024}}
TEXTS = ["a red car", "  two  spaces ", "été 漢字 👩‍👩‍👧", "\n\nlines\n", ""]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def processor(tokenizer):
    return QWEN3_VL.Processor(tokenizer, QWEN3_VL.Images.from_preprocessor(SMALL, CONFIG, 1024))


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("text", TEXTS)
def test_prompts_are_the_strings_of_the_recipe(processor, tokenizer, text):
    image = noise(130, 70)  # 4x2 visual tokens
    with_text = {"text": text, "image": image} if text else {"image": image}
    for side, process in (("query", processor.query), ("document", processor.document)):
        for given, known in (
            (text, {"text": text}),
            (with_text, {"text": text, "image": image}),
            ({"image": image}, {"image": image}),
        ):
            expected = tokenizer.encode(string(given, side, iter([8])), add_special_tokens=False).ids
            assert process(known).tokens.tolist() == expected


def test_pages_are_drawn_at_what_fits_the_image_and_the_row(processor, tokenizer):
    assert processor.page_pixels == 6**2 * 32**2  # the largest square within 40 units
    for limits, units in ((Limits(500, 64, 9, 0, 0), 16), (Limits(40, 400, 5, 0, 0), 25), (Limits(500, 400, 9, 0, 0), 36)):
        assert QWEN3_VL.Processor(tokenizer, processor.images, limits).page_pixels == units * 32**2


def test_units_are_in_raster_order(processor):
    """There are no windows, so patches have no padding, and image tokens point at one unit after another."""
    example = processor.query({"text": "a", "image": noise(130, 70)})
    assert example.visual[example.visual >= 0].tolist() == list(range(8))
    assert example.patch_mask.all() and example.patches == 32
    assert example.patch_arrays["patch_positions"][:6].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3]]
    assert (example.patch_arrays["patch_grid"] == [4, 8]).all()
    batch = collate([[RowItem(example, 1, 1)] * 2], Size(128, 80, 2), CONFIG.layout)
    assert batch.patches.shape == (1, 80, 768) and (batch.patch_segments > 0).sum() == 64
    assert batch.visual[batch.visual >= 0].tolist() == list(range(16))


@pytest.mark.parametrize("size", [(37, 91), (301, 203), (32, 32), (1, 1), (1, 200), (199, 1), (800, 61), (64, 65)])
def test_patches_equal_the_pillow_processor_of_transformers(processor, size):
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    theirs = module.Qwen2VLImageProcessorPil(**{key: SMALL[key] for key in ("size", "patch_size", "image_mean", "image_std")})
    expected = theirs(noise(*size), return_tensors="np")
    arrays = processor.document({"image": noise(*size)}).patch_arrays
    assert (1, *arrays["patch_grid"][0]) == tuple(expected["image_grid_thw"][0])
    ours = (arrays["patches"].reshape(-1, 3, 256).astype(np.float32) / 255 - 0.5) / 0.5
    for frame in range(2):
        np.testing.assert_allclose(ours, expected["pixel_values"].reshape(-1, 3, 2, 256)[:, :, frame], rtol=0, atol=1e-5)


def test_the_class_that_transformers_chooses():
    auto = pytest.importorskip("transformers.models.auto.image_processing_auto")
    assert auto.IMAGE_PROCESSOR_MAPPING_NAMES["qwen3_vl"]["pil"] == "Qwen2VLImageProcessorPil"


def test_the_released_preprocessor():
    images = QWEN3_VL.Images.from_preprocessor(PREPROCESSOR, CONFIG, 1024)
    assert (images.min_pixels, images.max_pixels, images.unit_size) == (64 * 1024, 1024 * 1024, 32)
    written = images.to_preprocessor(CONFIG)
    assert QWEN3_VL.Images.from_preprocessor(written, CONFIG, 1024) == images
    assert {key: written[key] for key in PREPROCESSOR if key != "size"} == {
        key: value for key, value in PREPROCESSOR.items() if key != "size"
    } | {"image_processor_type": "Qwen2VLImageProcessor"}
