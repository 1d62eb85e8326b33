"""Prompts against the strings of the recipe tokenized whole, positions against transformers, and batches."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from metaembed_jax.backbones.qwen.images import patchify
from metaembed_jax.backbones.qwen2_5_vl import SPECIAL_TOKENS, Config, Images, Processor
from metaembed_jax.errors import UserError
from metaembed_jax.inputs.examples import ShapeClass, collate
from tests.backbones.qwen2_5_vl.reference import CONFIGURATIONS

CONFIG = Images(min_pixels=56 * 56, max_pixels=60 * 28 * 28)
LAYOUT = Config.from_huggingface(CONFIGURATIONS["grouped"]).layout
CORPUS = ["user\nQuery: a red car", "Describe the image.", "user\nQuery: été 漢字 naïve", "Query: Query: airplane lock\n\n  snow"]
TEXTS = [
    "a red car",
    "  two  spaces ",
    "\n\nlines\n",
    "été 漢字 👩‍👩‍👧 Ωμέγα",
    "e\u0301 decomposed",
    "Query: again",
    "",
    "\x00\u200b",
    "مرحبا",
]
END = "<|im_end|><|endoftext|>"
QUERY_END = END + "<|endoftext|>" * 10 + "\n"


def train_tokenizer():
    """A small byte-level BPE, normalised and split as Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


TOKENIZER = train_tokenizer()
PROCESSOR = Processor(TOKENIZER, CONFIG)
IDS = {token: TOKENIZER.token_to_id(token) for token in SPECIAL_TOKENS}


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def whole(string):
    """The recipe's string, tokenized in one piece with special tokens recognised."""
    return TOKENIZER.encode(string, add_special_tokens=False).ids


def visual(image):
    grid = patchify(image, CONFIG).grid
    return f"<|vision_start|>{'<|image_pad|>' * (grid[0] * grid[1])}<|vision_end|>"


@pytest.mark.parametrize("text", TEXTS)
def test_prompts_are_the_strings_of_the_recipe(text):
    image = noise(101, 67)
    for item, middle in [
        ({"text": text}, lambda prefix: f"{prefix}{text}"),
        ({"text": text, "image": image}, lambda prefix: visual(image) + prefix + (text or "Describe the image.")),
        ({"image": image}, lambda prefix: visual(image) + prefix + "Describe the image."),
    ]:
        assert PROCESSOR.query(item).tokens.tolist() == whole("<|im_start|>user\n" + middle("Query: ") + QUERY_END)
        assert PROCESSOR.candidate(item).tokens.tolist() == whole("<|im_start|>user\n" + middle("") + END)


def test_prompts_equal_the_tokenizer_of_transformers():
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=TOKENIZER)
    for text in TEXTS:
        expected = fast(f"<|im_start|>user\nQuery: {text}{QUERY_END}", add_special_tokens=False)["input_ids"]
        assert PROCESSOR.query({"text": text}).tokens.tolist() == expected


@settings(max_examples=200, deadline=None)
@given(st.text())
@example("\u0301")  # composes with what stands before it
@example("\nQuery")
def test_any_text_is_tokenized_in_one_string_with_its_prompt(text):
    if any(token in text for token in SPECIAL_TOKENS):
        return
    assert PROCESSOR.query({"text": text}).tokens.tolist() == whole(f"<|im_start|>user\nQuery: {text}{QUERY_END}")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "a red", " ", "<|", "pad|>", "é"]), max_size=6).map("".join))
def test_special_strings_of_the_user_stay_text(text):
    for processor in (PROCESSOR, pickle.loads(pickle.dumps(PROCESSOR))):
        example = processor.candidate({"text": text, "image": noise(56, 56)})
        counts = {token: (example.tokens == number).sum() for token, number in IDS.items()}
        expected = dict.fromkeys(SPECIAL_TOKENS, 1) | {"<|image_pad|>": 4}
        assert counts == expected
        assert (example.token_arrays["visual_index"] >= 0).tolist() == (example.tokens == IDS["<|image_pad|>"]).tolist()
        start = example.tokens.tolist().index(IDS["<|vision_end|>"]) + 1
        assert TOKENIZER.decode(example.tokens[start:-2].tolist(), skip_special_tokens=False) == (text or "Describe the image.")


def test_the_given_tokenizer_is_left_alone():
    tokenizer = train_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    example = Processor(tokenizer, CONFIG).candidate({"text": "a red car"})
    assert example.tokens.tolist() == whole(f"<|im_start|>user\na red car{END}")
    assert tokenizer.truncation and tokenizer.padding and not tokenizer.encode_special_tokens


@pytest.mark.parametrize("size", [(101, 67), (56, 56), (60, 300), (333, 90), (28, 1500)])
@pytest.mark.parametrize("text", ["", "été 漢字"])
def test_positions_equal_get_rope_index(size, text):
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl").Qwen2_5_VLModel
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2))
    model = SimpleNamespace(config=config)
    model.get_vision_position_ids = lambda *args, **kwargs: reference.get_vision_position_ids(model, *args, **kwargs)
    examples = [
        PROCESSOR.query({"text": text, "image": noise(*size)}),
        PROCESSOR.candidate({"image": noise(*size[::-1])}),
        PROCESSOR.query({"text": text}),
    ]
    batch = collate(examples, ShapeClass(200, 4 * 64 * 16), LAYOUT)
    kinds = (batch["tokens"] == IDS["<|image_pad|>"]) & batch["mask"]
    grids = [[1, *(2 * side for side in patchify(noise(*shape), CONFIG).grid)] for shape in (size, size[::-1])]
    positions, _ = reference.get_rope_index(
        model,
        torch.tensor(batch["tokens"]).long(),
        torch.tensor(kinds.astype(np.int32)),
        torch.tensor(grids),
        attention_mask=torch.tensor(batch["mask"].astype(np.int32)),
    )
    expected = positions.numpy().transpose(1, 0, 2)
    kept = np.broadcast_to(batch["mask"][:, None], expected.shape)
    np.testing.assert_array_equal(batch["positions"][kept], expected[kept])


def test_image_tokens_point_at_their_units_in_window_order():
    image = noise(28 * 7, 28 * 5)
    example = PROCESSOR.candidate({"image": image, "text": "a"})
    assert patchify(image, CONFIG).grid == (5, 7)
    tokens = example.token_arrays["visual_index"] >= 0
    corners = example.patch_arrays["patch_positions"].reshape(-1, 4, 2)[example.token_arrays["visual_index"][tokens], 0] // 2
    np.testing.assert_array_equal(corners, np.stack(np.divmod(np.arange(35), 7), axis=1))
    start = np.flatnonzero(tokens)[0]
    np.testing.assert_array_equal(example.token_arrays["positions"][1:, tokens].T - start, corners)


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1, max_size=60) | st.text(alphabet=" \n\te\u0301漢👩‍", min_size=1, max_size=60), st.integers(0, 40))
def test_truncation_cuts_only_the_end_of_the_users_text(text, spare):
    image = noise(56, 84)
    for side in (PROCESSOR.query, PROCESSOR.candidate):
        for item in ({"text": text}, {"text": text, "image": image}):
            limit = len(whole_prompt(side, "", item.get("image"))) + spare
            full, cut = side(item).tokens.tolist(), side(item, max_tokens=limit).tokens.tolist()
            assert len(cut) <= limit
            if len(full) <= limit:
                assert cut == full
            else:
                assert cut in [whole_prompt(side, text[:n], item.get("image")) for n in range(len(text))]


def whole_prompt(side, text, image):
    prefix, end = ("Query: ", QUERY_END) if side == PROCESSOR.query else ("", END)
    return whole(f"<|im_start|>user\n{visual(image) if image else ''}{prefix}{text}{end}")


def test_truncation_keeps_the_most_that_fits():
    words = "a red car " * 50
    fixed = len(PROCESSOR.candidate({"text": ""}).tokens)
    for room in (1, 7, 40):
        cut = PROCESSOR.candidate({"text": words}, max_tokens=fixed + room)
        assert len(cut.tokens) == fixed + room


def test_no_room_for_prompt_or_image_is_an_error():
    with pytest.raises(UserError, match="^row 3: prompt and image alone are 4 tokens over the limit"):
        image = noise(112, 112)
        PROCESSOR.candidate({"image": image}, max_tokens=len(PROCESSOR.candidate({"image": image}).tokens) - 4, name="row 3")
    with pytest.raises(UserError, match="^row 3: prompt and image alone"):
        PROCESSOR.query({"text": "a red car"}, max_tokens=8, name="row 3")


@pytest.mark.parametrize(
    "item, message",
    [
        ({}, "neither text nor image"),
        ({"text": None, "image": None}, "neither text nor image"),
        ({"text": b"bytes"}, "the text is a bytes"),
        ({"text": "\ud800"}, "not valid Unicode"),
        ({"image": b"junk"}, "cannot be read"),
        ({"image": Image.new("RGB", (900, 2))}, "over 200 times"),
    ],
)
def test_bad_items_are_named(item, message):
    with pytest.raises(UserError, match=f"^icons row 9: .*{message}"):
        PROCESSOR.query(item, name="icons row 9")


def test_a_batch_is_the_one_that_the_network_reads():
    examples = [PROCESSOR.query({"text": "a red car"}), PROCESSOR.candidate({"image": noise(90, 200)})]
    batch = collate(examples, ShapeClass(tokens=80, patches=256), LAYOUT)
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "tokens": ((2, 80), "int32"),
        "positions": ((2, 3, 80), "int32"),
        "mask": ((2, 80), "bool"),
        "visual_index": ((2, 80), "int32"),
        "patches": ((2, 256, 588), "uint8"),
        "patch_positions": ((2, 256, 2), "int32"),
        "patch_mask": ((2, 256), "bool"),
    }
    assert (batch["visual_index"][~batch["mask"]] == -1).all() and batch["mask"][:, -1].all()
    patches = patchify(noise(90, 200), CONFIG)
    for name, array in patches.arrays.items():
        np.testing.assert_array_equal(batch[name][1, : len(array)], array)


def test_a_tokenizer_of_another_family_is_refused():
    with pytest.raises(UserError, match="lacks .*image_pad"):
        Processor(Tokenizer(models.BPE()), CONFIG)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_tokens([AddedToken(token, special=False) for token in SPECIAL_TOKENS])
    with pytest.raises(UserError, match="does not mark .*image_pad"):
        Processor(tokenizer, CONFIG)
