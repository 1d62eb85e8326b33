"""Prompts against the strings of the recipe tokenized whole, cuts, and places of visual tokens."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from metaembed_jax.backbones.paligemma.inputs import Images, Processor
from metaembed_jax.batch.items import Limits
from metaembed_jax.errors import UserError
from tests.backbones.paligemma.reference import string, write_tokenizer
from tests.backbones.qwen2_5_vl.reference import noise

PICTURE, IMAGES = noise(61, 40, 3), Images(image_size=30, patch_size=10)
TEXTS = ["a red car", "  two  spaces ", "\n\nlines\n", "été 漢字 👩‍👩‍👧", "Query: again", "", "\x00\u200b", "ends with a car\n"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def processor(tokenizer):
    return pickle.loads(pickle.dumps(Processor(tokenizer, IMAGES)))


@pytest.mark.parametrize("text", TEXTS)
def test_prompts_are_the_strings_of_the_recipe(tokenizer, processor, text):
    beside_image = {"image": PICTURE} | ({"text": text} if text else {})
    for side in ("query", "document"):
        for item, known in (({"text": text}, text), ({"text": text, "image": PICTURE}, beside_image)):
            expected = tokenizer.encode(string(known, side, 9), add_special_tokens=False).ids
            assert getattr(processor, side)(item).tokens.tolist() == expected


def test_special_strings_of_a_text_are_plain_text(processor):
    tokens = processor.document({"text": "<image><bos><pad>"}).tokens.tolist()
    assert not {0, 2, 3} & set(tokens[1:])


def test_visual_tokens_come_first_in_raster_order(processor):
    example = processor.query({"text": "where", "image": PICTURE})
    assert example.visual.tolist() == [*range(9), *[-1] * (len(example.tokens) - 9)]
    assert example.patch_arrays["patches"].shape == (9, 300) and example.patch_mask.tolist() == [True] * 9
    square = np.asarray(PICTURE.resize((30, 30), 3))
    np.testing.assert_array_equal(example.patch_arrays["patches"][5], square[10:20, 20:30].transpose(2, 0, 1).ravel())
    assert processor.query({"text": "where"}).patch_arrays == {}
    assert example.positions.tolist() == [[*range(len(example.tokens))]]


def test_a_page_covers_both_sides_of_the_square(tokenizer, processor):
    assert processor.page_pixels == Processor(tokenizer, IMAGES, Limits(100, 9, 512, 10, 10)).page_pixels == 2 * 30 * 30
    assert Processor(tokenizer, IMAGES, Limits(40, 0, 9, 0, 0)).page_pixels == 2


def test_cuts_take_the_end_of_the_text_only(tokenizer):
    processor = Processor(tokenizer, IMAGES, Limits(70, 9, 512, 10, 10))
    for side, end in (("query", [0] * 10 + tokenizer.encode("\n").ids), ("document", tokenizer.encode("\n").ids)):
        item = {"text": "cloud question " * 30, "image": PICTURE}
        example = getattr(processor, side)(item)
        tokens = example.tokens.tolist()
        assert len(tokens) <= 60 and example.cut and tokens[: 9 + 1] == [3] * 9 + [2]
        text = tokenizer.decode(tokens[10:], skip_special_tokens=True)
        assert text.startswith("Query: cloud" if side == "query" else "cloud") and text.endswith("\n")
        assert tokens[-len(end) :] == end or side == "document"


def test_rows_hold_an_image_or_none(tokenizer):
    """An image has one size. Rows without patches are for texts."""
    for limits in (Limits(100, 8, 9, 0, 0), Limits(40, 9, 9, 0, 30)):
        with pytest.raises(
            UserError, match="config.rows.size leaves .* tokens and [89] patches for an image: expected at least 9 and 9"
        ):
            Processor(tokenizer, IMAGES, limits)
    texts = Processor(tokenizer, IMAGES, Limits(40, 0, 9, 0, 0))
    assert texts.query({"text": "where"}).tokens.tolist() == Processor(tokenizer, IMAGES).query({"text": "where"}).tokens.tolist()
    with pytest.raises(UserError, match="^thing: config.rows.size leaves .* tokens and 0 patches for an image"):
        texts.size({"image": (4, 5)}, "query", name="thing")


@settings(max_examples=60, deadline=None)
@given(
    st.none() | st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.text(max_size=30) | st.integers(0, 90).map(lambda words: "a red été " * words),
    st.sampled_from(["query", "document"]),
    st.none() | st.tuples(st.integers(70, 130), st.integers(9, 20), st.integers(1, 60)),
)
def test_sizes_are_those_of_the_examples(tokenizer, image, text, side, limits):
    """Sizes are known without decoding, and the example fits any limits."""
    processor = Processor(tokenizer, IMAGES, limits and Limits(*limits, 16, 20))
    item = {"text": text} | ({} if image is None else {"image": noise(*image[::-1], 0)})
    example = getattr(processor, side)(item)
    size = processor.size(item if image is None else item | {"image": image}, side)
    assert size == (len(example.tokens), example.patches, example.cut, example.shrunk)
    assert size == processor.size(item, side)
    whole = getattr(Processor(tokenizer, IMAGES), side)(item)
    assert size.tokens + size.cut == len(whole.tokens) and size.patches == whole.patches and not size.shrunk
    if limits:
        assert size.tokens <= processor.limits.prompt(side)
    else:
        assert not size.cut


def test_tokenizers_of_other_families_are_refused(tokenizer):
    other = Tokenizer.from_str(tokenizer.to_str().replace("<image>", "<picture>"))
    with pytest.raises(UserError, match="lacks <image>; use a PaliGemma tokenizer.json"):
        Processor(other, Images(30, 10))
