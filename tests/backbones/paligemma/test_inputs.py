"""Prompts against the strings of the recipe tokenized whole, cuts, and places of visual tokens."""

import pickle

import numpy as np
import pytest
from tokenizers import Tokenizer

from metaembed_jax.backbones.paligemma import Images, Processor
from metaembed_jax.errors import UserError
from tests.backbones.paligemma.reference import string, write_tokenizer
from tests.backbones.qwen2_5_vl.reference import noise

PICTURE = noise(61, 40, 3)
TEXTS = ["a red car", "  two  spaces ", "\n\nlines\n", "été 漢字 👩‍👩‍👧", "Query: again", "", "\x00\u200b", "ends with a car\n"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def processor(tokenizer):
    return pickle.loads(pickle.dumps(Processor(tokenizer, Images(image_size=30, patch_size=10))))


@pytest.mark.parametrize("text", TEXTS)
def test_prompts_are_the_strings_of_the_recipe(tokenizer, processor, text):
    beside_image = {"image": PICTURE} | ({"text": text} if text else {})
    for side in ("query", "candidate"):
        for item, known in (({"text": text}, text), ({"text": text, "image": PICTURE}, beside_image)):
            expected = tokenizer.encode(string(known, side, 9), add_special_tokens=False).ids
            assert getattr(processor, side)(item).tokens.tolist() == expected


def test_special_strings_of_a_text_are_plain_text(processor):
    tokens = processor.candidate({"text": "<image><bos><pad>"}).tokens.tolist()
    assert not {0, 2, 3} & set(tokens[1:])


def test_visual_tokens_come_first_in_raster_order(processor):
    example = processor.query({"text": "where", "image": PICTURE})
    assert example.token_arrays["visual_index"].tolist() == [*range(9), *[-1] * (len(example.tokens) - 9)]
    assert example.patch_arrays["patches"].shape == (9, 300) and example.patch_arrays["patch_mask"].all()
    square = np.asarray(PICTURE.resize((30, 30), 3))
    np.testing.assert_array_equal(example.patch_arrays["patches"][5], square[10:20, 20:30].transpose(2, 0, 1).ravel())
    assert processor.query({"text": "where"}).patch_arrays == {}


def test_cuts_take_the_end_of_the_text_only(tokenizer, processor):
    for side, end in (("query", [0] * 10 + tokenizer.encode("\n").ids), ("candidate", tokenizer.encode("\n").ids)):
        item = {"text": "cloud question " * 30, "image": PICTURE}
        tokens = getattr(processor, side)(item, max_tokens=60).tokens.tolist()
        assert len(tokens) <= 60 and tokens[: 9 + 1] == [3] * 9 + [2]
        text = tokenizer.decode(tokens[10:], skip_special_tokens=True)
        assert text.startswith("Query: cloud" if side == "query" else "cloud") and text.endswith("\n")
        assert tokens[-len(end) :] == end or side == "candidate"
        with pytest.raises(
            UserError, match=r"thing: prompt and image alone are .* over the limit; raise it, .* \(some families ignore it\)"
        ):
            getattr(processor, side)(item, max_tokens=9, name="thing")


def test_tokenizers_of_other_families_are_refused(tokenizer):
    other = Tokenizer.from_str(tokenizer.to_str().replace("<image>", "<picture>"))
    with pytest.raises(UserError, match="lacks <image>; use a PaliGemma tokenizer.json"):
        Processor(other, Images(30, 10))
