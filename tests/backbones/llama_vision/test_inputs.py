"""Images against transformers' Pillow processor, prompts against the strings of the recipe tokenized whole."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models

from metaembed_jax.backbones.llama_vision.config import Config
from metaembed_jax.backbones.llama_vision.inputs import SPECIAL_TOKENS, Images, Processor, arrange, fit, patchify
from metaembed_jax.batch.items import Limits, Size
from metaembed_jax.batch.rows import RowItem, collate
from metaembed_jax.errors import UserError
from tests.backbones.llama_vision.reference import BEGIN, CONFIGURATIONS, END, IMAGE, TALL, configuration, string
from tests.backbones.llama_vision.reference import tokenizer as small_tokenizer
from tests.backbones.qwen2_5_vl.reference import noise

TEXTS = ["a red car", "  two  spaces ", "\n\nlines\n", "été 漢字 👩‍👩‍👧 Ωμέγα", "Query: again", "", "\x00\u200b", "مرحبا"]
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def sized(side, tiles, patch=14):
    return Config.from_huggingface(
        configuration(heads=(2, 2), width=32, layers=2, crossings=(1,), scaled=True, vision=(1, 1), vision_width=24, vision_heads=4,
                      kept=(0,), side=side, tiles=tiles, patch=patch)
    )  # fmt: skip


CONFIG = sized(42, 4)
IMAGES = Images.from_run(None, CONFIG, None)


PATCHES = 4 * 9  # of every image


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def processor(tokenizer):
    return Processor(tokenizer, IMAGES)


def theirs(side, tiles):
    module = pytest.importorskip("transformers.models.mllama.image_processing_pil_mllama")
    size = {"height": side, "width": side}
    return module.MllamaImageProcessorPil(size=size, max_image_tiles=tiles, image_mean=MEAN, image_std=STD)


def test_pages_are_drawn_at_the_size_of_a_canvas(processor):
    assert processor.page_pixels == 4 * 42**2


@pytest.mark.parametrize("side, tiles, patch", [(42, 4, 14), (560, 4, 14), (40, 3, 10), (28, 6, 14)])
@pytest.mark.parametrize("size", [(37, 91), (203, 301), (28, 28), (1, 1), (1, 200), (199, 1), (61, 800), (1130, 560), (2000, 1999)])
def test_tiles_equal_the_pillow_processor_of_transformers(side, tiles, patch, size):
    config, image = sized(side, tiles, patch), noise(*size, seed=sum(size))
    seen = theirs(side, tiles)([[image]], return_tensors="np")
    images = Images.from_run(None, config, None)
    arrays = patchify(image, arrange(image.height, image.width, images), images)
    [[count]] = seen["num_tiles"]
    assert len(arrays["patches"]) == images.image_patches == config.layout.multiple
    across = side // patch
    patches = arrays["patches"].reshape(tiles, across, across, 3, patch, patch).transpose(0, 3, 1, 4, 2, 5)
    pixels = patches.reshape(tiles, 3, side, side).astype(np.float32) / 255
    pixels = (pixels - np.float32(MEAN)[:, None, None]) / np.float32(STD)[:, None, None]
    np.testing.assert_allclose(pixels[:count], seen["pixel_values"][0, 0, :count], rtol=0, atol=1e-5)
    assert not seen["pixel_values"][0, 0, count:].any() and seen["aspect_ratio_mask"][0, 0].sum() == count
    is_image = arrays.pop("patch_mask")
    assert is_image.sum() == count * across**2 and is_image[: count * across**2].all()
    assert not arrays["patches"][~is_image].any()
    assert (arrays["aspect_ratio"] == seen["aspect_ratio_ids"][0, 0] * is_image).all()
    assert {name: array.dtype.name for name, array in arrays.items()} == {
        name: spec.dtype for name, spec in config.layout.patches.items()
    }


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 9), st.sampled_from([42, 224, 448, 560]))
@example(560, 1120, 4, 560)
@example(561, 560, 4, 560)
@example(1120, 1120, 4, 560)  # several canvases that it fills alike
@example(3000, 1, 4, 560)
def test_canvas_and_size_equal_transformers(height, width, tiles, side):
    module = pytest.importorskip("transformers.models.mllama.image_processing_pil_mllama")
    canvas = module.get_optimal_tiled_canvas(height, width, tiles, side)
    images = Images(side, 14, tiles, tuple(module.get_all_supported_aspect_ratios(tiles)))
    arrangement = arrange(height, width, images)
    assert (arrangement[0] * side, arrangement[1] * side) == tuple(canvas)
    assert fit(height, width, arrangement, side) == module.get_image_size_fit_to_canvas(height, width, *canvas, side)


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 6, 9])
def test_arrangements_are_numbered_as_by_transformers(tiles):
    module = pytest.importorskip("transformers.models.mllama.image_processing_pil_mllama")
    assert sized(42, tiles).vision_config.arrangements == module.get_all_supported_aspect_ratios(tiles)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("side", ["query", "document"])
def test_prompts_are_the_strings_of_the_recipe(tokenizer, processor, text, side):
    process, end = getattr(processor, side), END * 11 + "\n" if side == "query" else END
    prefix = "Query: " if side == "query" else ""
    for item, expected in [
        ({"text": text}, f"{BEGIN}{prefix}{text}{end}"),
        ({"text": text, "image": TALL}, f"{IMAGE}{BEGIN}{prefix}{text or 'Describe the image.'}{end}"),
        ({"image": TALL}, f"{IMAGE}{BEGIN}{prefix}Describe the image.{end}"),
    ]:
        assert process(item).tokens.tolist() == tokenizer.encode(expected, add_special_tokens=False).ids
    if text:  # the reference for parity has them too
        assert string(text, side) == f"{BEGIN}{prefix}{text}{end}"
        assert string({"text": text, "image": TALL}, side) == f"{IMAGE}{BEGIN}{prefix}{text}{end}"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "a red", " ", "<|", "image|>", "é"]), max_size=6).map("".join))
def test_special_strings_of_the_user_stay_text(tokenizer, processor, text):
    for used in (processor, pickle.loads(pickle.dumps(processor))):
        tokens = used.document({"text": text, "image": TALL}).tokens.tolist()
        assert [tokens.count(tokenizer.token_to_id(token)) for token in SPECIAL_TOKENS] == [1, 1, 1]
        assert tokenizer.decode(tokens[2:-1], skip_special_tokens=False) == (text or "Describe the image.")


def within(tokenizer, prompt, side, patches=PATCHES, text=1000):
    """A processor whose prompts of one side have at most so many tokens; those of the other have 500 more."""
    query, document = {"query": (500, 0), "document": (0, 500)}[side]
    return Processor(tokenizer, IMAGES, Limits(500 + prompt, patches, text, query, document))


@pytest.mark.parametrize("side", ["query", "document"])
def test_truncation_cuts_only_the_end_of_the_users_text(tokenizer, processor, side):
    words = "a red car " * 20
    whole = getattr(processor, side)({"text": words, "image": TALL}).tokens
    least = len(getattr(processor, side)({"text": "x", "image": TALL}).tokens) - 1
    for spare in (5, 11):
        converted = getattr(within(tokenizer, least + spare, side), side)({"text": words, "image": TALL})
        shorter = [string({"text": words[:n], "image": TALL}, side) for n in range(len(words))]
        assert (
            len(converted.tokens) == least + spare and converted.cut == len(whole) - len(converted.tokens) and not converted.shrunk
        )
        assert converted.tokens.tolist() in [tokenizer.encode(text, add_special_tokens=False).ids for text in shorter]


def test_a_row_without_room_for_an_image_is_refused(tokenizer):
    with pytest.raises(UserError, match="^query: config.rows.size leaves .* and 35 patches for an image: .* 0 and 36"):
        within(tokenizer, 100, "query", patches=PATCHES - 1)
    with pytest.raises(UserError, match="^query: its prompt alone takes .* tokens, and config.rows.size leaves 20"):
        within(tokenizer, 20, "query")
    texts = within(tokenizer, 100, "document", patches=0)
    assert len(texts.document({"text": "a red car"}).tokens) > 3
    with pytest.raises(UserError, match="^row 3: config.rows.size leaves .* and 0 patches for an image"):
        texts.document({"image": TALL}, name="row 3")


@settings(max_examples=60, deadline=None)
@given(
    st.none() | st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.text(max_size=30) | st.integers(0, 90).map(lambda words: "a red été " * words),
    st.sampled_from(["query", "document"]),
    st.none() | st.tuples(st.integers(60, 130), st.just(PATCHES), st.integers(1, 60)),
)
def test_sizes_are_those_of_the_examples(tokenizer, processor, image, text, side, limits):
    """Sizes are known without decoding, and the example fits any limits."""
    used = processor if limits is None else Processor(tokenizer, IMAGES, Limits(*limits, 16, 20))
    item = {"text": text} | ({} if image is None else {"image": noise(*image, 0)})
    described = item if image is None else item | {"image": image}
    converted = getattr(used, side)(item)
    size = used.size(described, side)
    assert size == (len(converted.tokens), converted.patches, converted.cut, converted.shrunk)
    assert size == used.size(item, side)
    assert size.patches == (0 if image is None else PATCHES) == len(converted.patch_arrays.get("patches", ()))
    if limits:
        assert size.tokens <= used.limits.prompt(side)
    else:
        assert not size.cut and not size.shrunk


@pytest.mark.parametrize(
    "item, message",
    [({}, "neither text nor image"), ({"text": "\ud800"}, "not valid Unicode"), ({"image": b"junk"}, "cannot be read")],
)
def test_bad_items_are_named(processor, item, message):
    with pytest.raises(UserError, match=f"^icons row 9.*{message}"):
        processor.query(item, name="icons row 9")


def test_rows_hold_items_with_and_without_images(processor):
    """Two images in a row, with a text between them; padding tiles belong to no item."""
    items = {"image": noise(20, 100, 0)}, {"text": "a red car"}, {"image": noise(80, 80, 0)}
    examples = [processor.document(item) for item in items]
    counts = [each.patch_mask.sum() for each in examples]
    assert 0 == counts[1] < counts[0] < PATCHES and counts[2] == PATCHES
    batch = collate([[RowItem(each, 3, 2) for each in examples], []], Size(160, 3 * PATCHES, 6), CONFIG.layout)
    segments = np.repeat([1, 0, 3, 0], [counts[0], PATCHES - counts[0], PATCHES, PATCHES])
    assert batch.patch_segments.tolist() == [segments.tolist(), [0] * 3 * PATCHES]
    assert ((batch.patch_arrays["aspect_ratio"] > 0) == (batch.patch_segments > 0)).all() and (batch.visual == -1).all()
    for segment, each in enumerate(examples, 1):
        own = batch.segments[0] == segment
        assert batch.tokens[0, own].tolist() == [*each.tokens, 0, 0, 0]
        assert batch.positions[0, 0, own].tolist() == list(range(len(each.tokens) + 3))
    assert collate([[RowItem(examples[1], 3, 2)]], Size(160, 0, 6), CONFIG.layout).patches is None


def test_a_tokenizer_of_another_family_is_refused():
    with pytest.raises(UserError, match="lacks .*image.*Llama-3.2-Vision"):
        Processor(Tokenizer(models.BPE()), IMAGES)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_tokens([AddedToken(token, special=False) for token in SPECIAL_TOKENS])
    with pytest.raises(UserError, match="does not mark .*image"):
        Processor(tokenizer, IMAGES)


def test_what_is_written_for_transformers_is_what_it_writes(tmp_path):
    """The file is also read back as the same images."""
    stored = IMAGES.to_preprocessor(CONFIG)
    assert Images.from_preprocessor(stored, CONFIG, 1024) == IMAGES
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    read = type(theirs(42, 4)).from_pretrained(tmp_path)
    expected, pixels = (images([[TALL]], return_tensors="np")["pixel_values"] for images in (theirs(42, 4), read))
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize(
    "preprocessor",
    [
        {"do_resize": False},
        {"do_pad": False},
        {"resample": 3},
        {"max_image_tiles": 3},
        {"size": {"height": 42, "width": 56}},
        {"size": {"shortest_edge": 42}},
        {"size": 42},
    ],
)
def test_a_preprocessor_of_another_kind_is_refused(preprocessor):
    with pytest.raises(UserError, match=f"preprocessor_config.json: {next(iter(preprocessor))}="):
        Images.from_preprocessor(preprocessor, CONFIG, 1024)


def test_every_configuration_has_its_own_sizes():
    sizes = {(c["vision_config"]["image_size"], c["vision_config"]["max_num_tiles"]) for c in CONFIGURATIONS.values()}
    assert len(sizes) == len(CONFIGURATIONS)
