"""Images against transformers' Pillow processor, prompts against the strings that its processor makes of them."""

import dataclasses
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from metaembed_jax.backbones.smolvlm.config import Config
from metaembed_jax.backbones.smolvlm.images import Images, patchify, scaled, tiling
from metaembed_jax.backbones.smolvlm.inputs import SPECIAL_TOKENS, Processor
from metaembed_jax.batch.items import Limits
from metaembed_jax.errors import UserError
from tests.backbones.qwen2_5_vl.reference import noise
from tests.backbones.smolvlm.reference import (
    CONFIGURATIONS,
    END,
    IMAGE,
    MARKERS,
    MEAN,
    NEEDED,
    STD,
    TALL,
    process,
    stock_processor,
    write_tokenizer,
)

TEXTS = ["a red car", "  two  spaces ", "\n\nlines\n", "été 漢字 👩‍👩‍👧", "Query: again", "", "\x00\u200b", "مرحبا"]


def images(name, edge=None):
    """Return the images of a configuration, or of one with another longest edge."""
    config = Config.from_huggingface(CONFIGURATIONS[name])
    preprocessor = Images.from_run(SimpleNamespace(max_pixels=1), config, None).to_preprocessor(config)
    size = {"longest_edge": edge or CONFIGURATIONS[name]["longest_edge"]}
    return config, Images.from_preprocessor(preprocessor | {"size": size}, config, 10**6)


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def case(request, tmp_path_factory):
    """A tokenizer, our processor, and transformers' of the same files."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    directory, (config, ours) = tmp_path_factory.mktemp("tokenizer"), images(request.param)
    write_tokenizer(directory, CONFIGURATIONS[request.param]["marked"])
    (directory / "preprocessor_config.json").write_text(json.dumps(ours.to_preprocessor(config)))
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    vision = config.vision_config
    theirs = stock_processor(directory, SimpleNamespace(vision_config=vision, scale_factor=vision.scale_factor))
    largest = images(request.param, 6 * vision.image_size)[1]  # any number of tiles
    ours = Processor(tokenizer, ours)
    return SimpleNamespace(tokenizer=tokenizer, ours=ours, largest=largest, theirs=theirs, scale_factor=vision.scale_factor)


@pytest.mark.parametrize("name, edge", [("marked", 72), ("marked", 144), ("marked", 24), ("spelled", 50), ("spelled", 51)])
@pytest.mark.parametrize("size", [(37, 91), (203, 301), (24, 24), (1, 1), (1, 200), (199, 1), (61, 400), (700, 699)])
def test_tiles_equal_the_pillow_processor_of_transformers(name, edge, size):
    module = pytest.importorskip("transformers.models.idefics3.image_processing_pil_idefics3")
    (config, ours), image = images(name, edge), noise(*size, seed=sum(size))
    vision = config.vision_config
    tile = {"longest_edge": vision.image_size}
    theirs = module.Idefics3ImageProcessorPil(size={"longest_edge": edge}, max_image_size=tile, image_mean=MEAN, image_std=STD)
    seen = theirs([[image]], return_tensors="np", return_row_col_info=True)
    grid = next(ours.grids(*image.size))
    patches = patchify(image, grid, ours)
    assert (grid.rows, grid.columns) == (max(seen["rows"][0][0], 1), max(seen["cols"][0][0], 1))
    assert grid.patches == len(patches) and not grid.shrunk
    side, patch = vision.side, vision.patch_size
    pixels = patches.reshape(-1, side, side, 3, patch, patch).transpose(0, 3, 1, 4, 2, 5).reshape(-1, 3, side * patch, side * patch)
    pixels = (pixels.astype(np.float32) / 255 - np.float32(MEAN)[:, None, None]) / np.float32(STD)[:, None, None]
    np.testing.assert_allclose(pixels, seen["pixel_values"][0][:, :, : side * patch, : side * patch], rtol=0, atol=1e-5)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([24, 364, 512]), st.integers(1, 6), st.integers(0, 20))
@example(8000, 1, 512, 4, 0)
@example(1, 60_000_000, 384, 4, 0)
@example(1000, 1000, 512, 4, 1)
def test_sizes_equal_transformers(height, width, tile, sides, less):
    module = pytest.importorskip("transformers.models.idefics3.image_processing_pil_idefics3")
    longest = tile * sides - less
    size = scaled(height, width, longest)
    assert size == module.get_resize_output_image_size(np.broadcast_to(np.uint8(0), (3, height, width)), longest)

    class Sizes(module.Idefics3ImageProcessorPil):
        def resize(self, image, size, resample):
            return size.height // tile, size.width // tile

    rows, columns = tiling(*size, tile)
    assert (rows, columns) == Sizes().resize_for_vision_encoder(np.broadcast_to(np.uint8(0), (3, *size)), tile)
    assert max(rows, columns) <= sides


@pytest.mark.parametrize("side", ["query", "document"])
@pytest.mark.parametrize("size", [(150, 61), (50, 160), (90, 90), (1, 1)])
def test_prompts_are_the_strings_of_transformers(case, side, size):
    """Prompts with tiles as the processor of transformers writes them."""
    image = noise(*size, 1)
    for text in TEXTS:
        for item in (text, {"text": text, "image": image}, {"image": image}):
            example = getattr(case.ours, side)(item if isinstance(item, dict) else {"text": item})
            expected = process(case.theirs, [item], side)
            assert example.tokens.tolist() == expected["input_ids"][0].tolist()
            visual = example.tokens == NEEDED.index(IMAGE)
            assert example.visual[visual].tolist() == list(range(visual.sum()))
            assert (example.visual[~visual] == -1).all()
            assert visual.sum() == example.patches // case.scale_factor**2


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([*NEEDED, "<row_1_col_1>", "a red", " ", "<|", "image>", "é"]), max_size=6).map("".join))
def test_special_strings_of_the_user_stay_text(case, text):
    least = case.ours.document({"text": "x", "image": TALL}).tokens.tolist()
    tokens = pickle.loads(pickle.dumps(case.ours)).document({"text": text, "image": TALL}).tokens.tolist()
    for token in SPECIAL_TOKENS:
        number = case.tokenizer.token_to_id(token)
        assert number is None or tokens.count(number) == least.count(number)
    behind = case.tokenizer.decode(tokens[least.index(NEEDED.index(END)) - 1 : -1], skip_special_tokens=False)
    assert behind == (text or "Describe the image.")


@pytest.mark.parametrize("spare", [0, 1, 5])
def test_truncation_cuts_only_the_end_of_the_users_text(case, spare):
    words = "a red car " * 9
    for side in ("query", "document"):
        encode = getattr(case.ours, side)
        least = len(encode({"text": "x", "image": TALL}).tokens) - 1
        query, document = {"query": (500, 0), "document": (0, 500)}[side]
        limits = Limits(500 + least + spare, 10**4, 512, query, document)
        example = getattr(Processor(case.tokenizer, case.ours.images, limits), side)({"text": words, "image": TALL})
        wholes = [encode({"text": words[:n], "image": TALL}).tokens.tolist() for n in range(1, len(words))]
        tokens = example.tokens.tolist()
        assert len(tokens) == least + spare and (tokens in wholes or not spare)
        assert not example.shrunk and example.cut == len(encode({"text": words, "image": TALL}).tokens) - least - spare


@pytest.mark.parametrize("size", [(203, 301), (1, 200), (700, 699), (150, 61)])
def test_a_shrunk_image_is_that_of_a_smaller_longest_edge(size):
    """And so the one that transformers makes with it; of those that fit, the largest."""
    ours, image = images("marked", 144)[1], noise(*size[::-1], seed=0)
    grids = list(ours.grids(*size))
    assert [max(grid.rows, grid.columns) for grid in grids] == [6, 5, 4, 3, 2, 1]
    assert [grid.shrunk for grid in grids] == [False] + [True] * 5
    for grid in grids:
        edge = 24 * max(grid.rows, grid.columns)
        smaller = images("marked", edge)[1]
        natural = next(smaller.grids(*size))
        assert grid == natural._replace(shrunk=edge < 144)
        np.testing.assert_array_equal(patchify(image, grid, ours), patchify(image, natural, smaller))
        assert grid.patches == 36 * (grid.rows * grid.columns + (grid.rows * grid.columns > 1))


@pytest.mark.parametrize("case", CONFIGURATIONS, indirect=True)
def test_a_row_holds_a_tile_or_no_image(case):
    smallest = dataclasses.replace(case.largest, longest_edge=case.largest.tile_size)
    least, tile, *_ = Processor(case.tokenizer, smallest).size({"image": (1, 1)}, "query")
    one_tile = Processor(case.tokenizer, case.ours.images, Limits(least, tile, 9, 0, 0))
    size = one_tile.size({"image": (300, 7)}, "query")
    assert size.tokens <= least and size.patches == tile and size.shrunk
    for limits in (Limits(least, tile - 1, 9, 0, 0), Limits(least - 1, tile, 9, 0, 0)):
        with pytest.raises(UserError, match="^query: config.rows.size leaves .* patches for an image: expected at least"):
            Processor(case.tokenizer, case.ours.images, limits)
    texts = Processor(case.tokenizer, case.ours.images, Limits(least, 0, 9, 0, 0))
    with pytest.raises(UserError, match="^thing: config.rows.size leaves .* tokens and 0 patches for an image"):
        texts.document({"image": TALL}, name="thing")


@settings(max_examples=60, deadline=None)
@given(
    st.none() | st.tuples(st.integers(1, 300), st.integers(1, 300)) | st.sampled_from([(1, 3000), (3000, 1), (150, 61)]),
    st.text(max_size=30) | st.integers(0, 90).map(lambda words: "a red été " * words),
    st.sampled_from(["query", "document"]),
    st.none() | st.tuples(st.integers(110, 220), st.integers(36, 300), st.integers(1, 60)),
)
def test_sizes_are_those_of_the_examples(case, image, text, side, limits):
    """Sizes are known without decoding. The example fits any limits, and an image with more tiles would not."""
    unlimited = Processor(case.tokenizer, case.largest)
    processor = Processor(case.tokenizer, case.largest, limits and Limits(*limits, 16, 20))
    item = {"text": text} | ({} if image is None else {"image": noise(*image[::-1], 0)})
    example = getattr(processor, side)(item)
    size = processor.size(item if image is None else item | {"image": image}, side)
    assert size == (len(example.tokens), example.patches, example.cut, example.shrunk)
    assert size == processor.size(item, side)
    whole = unlimited.size(item, side)
    assert not whole.cut and not whole.shrunk
    assert size.shrunk == (size.patches < whole.patches)
    if limits:
        assert size.tokens <= processor.limits.prompt(side) and size.patches <= limits[1]
        if size.shrunk and not text:
            grids = list(case.largest.grids(*image))
            before = grids[[grid.patches for grid in grids].index(size.patches) - 1]
            edge = case.largest.tile_size * max(before.rows, before.columns)
            larger = Processor(case.tokenizer, dataclasses.replace(case.largest, longest_edge=edge)).size({"image": image}, side)
            assert larger.tokens > processor.limits.prompt(side) or larger.patches > limits[1]
    else:
        assert size == whole


@pytest.mark.parametrize("cap, tiles", [(1, 1), (4, 1), (19, 1), (20, 2), (39, 2), (40, 3), (67, 3), (68, 4), (10**6, 6)])
def test_a_cap_on_visual_tokens_holds_for_square_images_too(cap, tiles):
    """Four to a tile, and one tile more than there are on the page."""
    config, most = images("marked", 144)
    capped = Images.from_preprocessor(most.to_preprocessor(config), config, cap)
    assert capped.longest_edge == 24 * tiles
    count = next(capped.grids(70, 70)).patches // config.layout.multiple
    assert count == tiles**2 + (tiles > 1) and (4 * count <= cap or tiles == 1)
    assert Images.from_preprocessor(capped.to_preprocessor(config), config, cap) == capped


@pytest.mark.parametrize(
    "pixels, cap, edge", [(1, None, 24), (47**2, None, 24), (48**2, None, 48), (10**9, None, 144), (9**9, 20, 48)]
)
def test_a_run_says_how_large_images_are_by_max_pixels(pixels, cap, edge):
    config, _ = images("marked")
    assert Images.from_run(SimpleNamespace(max_pixels=pixels), config, cap).longest_edge == edge


@pytest.mark.parametrize(
    "change, message",
    [
        ({"do_image_splitting": False}, "do_image_splitting=False is not supported"),
        ({"resample": 3}, "resample=3 is not supported; expected 1"),
        ({"max_image_size": {"longest_edge": 364}}, "max_image_size=.*364.* expected {'longest_edge': 24}"),
        ({"size": {"height": 48, "width": 48}}, "size is .*; expected longest_edge alone"),
        ({"size": {"longest_edge": 48.0}}, "size.longest_edge is 48.0; expected a positive integer"),
        ({"size": {"longest_edge": 145}}, "size.longest_edge is 145; expected at most 144"),
        ({"size": 48}, "size is 48"),
    ],
)
def test_a_preprocessor_of_another_kind_is_refused(change, message):
    config, ours = images("marked")
    with pytest.raises(UserError, match=message):
        Images.from_preprocessor(ours.to_preprocessor(config) | change, config, 1024)


def test_tokenizers_of_other_families_are_refused(case):
    other = Tokenizer.from_str(case.tokenizer.to_str().replace("<image>", "<picture>"))
    with pytest.raises(UserError, match="lacks <image>; use a SmolVLM tokenizer.json"):
        Processor(other, case.ours.images)
    assert set(SPECIAL_TOKENS) == {*NEEDED, *MARKERS}


def test_pages_are_drawn_at_the_size_of_all_tiles(case):
    tile = case.largest.tile_size
    assert Processor(case.tokenizer, case.largest).page_pixels == (6 * tile) ** 2
    patches = (tile // case.largest.patch_size) ** 2
    assert Processor(case.tokenizer, case.largest, Limits(10**5, 5 * patches, 9, 0, 0)).page_pixels == (2 * tile) ** 2
