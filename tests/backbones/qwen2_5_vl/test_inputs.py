"""Prompts against the strings of the recipe tokenized whole, positions against transformers, and batches."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from metaembed_jax.backbones.qwen.inputs import SPECIAL_TOKENS
from metaembed_jax.backbones.qwen2_5_vl.config import Config
from metaembed_jax.backbones.qwen2_5_vl.inputs import Images, Processor
from metaembed_jax.batch.items import Limits, Size
from metaembed_jax.batch.rows import RowItem, collate
from metaembed_jax.errors import UserError
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
    """The recipe's string, tokenized as a whole with special tokens recognised."""
    return TOKENIZER.encode(string, add_special_tokens=False).ids


def grid(image):
    cut = CONFIG.grid(*image.size, None, None, "image")
    return cut.rows, cut.columns


def visual(image):
    return f"<|vision_start|>{'<|image_pad|>' * np.prod(grid(image))}<|vision_end|>"


def within(prompt, side, patches=0):
    """A processor whose prompts of one side have at most so many tokens."""
    query, document = {"query": (500, 0), "document": (0, 500)}[side]
    return Processor(TOKENIZER, CONFIG, Limits(500 + prompt, patches, 1000, query, document))


@pytest.mark.parametrize("text", TEXTS)
def test_prompts_are_the_strings_of_the_recipe(text):
    image = noise(101, 67)
    for item, middle in [
        ({"text": text}, lambda prefix: f"{prefix}{text}"),
        ({"text": text, "image": image}, lambda prefix: visual(image) + prefix + (text or "Describe the image.")),
        ({"image": image}, lambda prefix: visual(image) + prefix + "Describe the image."),
    ]:
        assert PROCESSOR.query(item).tokens.tolist() == whole("<|im_start|>user\n" + middle("Query: ") + QUERY_END)
        assert PROCESSOR.document(item).tokens.tolist() == whole("<|im_start|>user\n" + middle("") + END)


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
        example = processor.document({"text": text, "image": noise(56, 56)})
        counts = {token: (example.tokens == number).sum() for token, number in IDS.items()}
        expected = dict.fromkeys(SPECIAL_TOKENS, 1) | {"<|image_pad|>": 4}
        assert counts == expected
        assert (example.visual >= 0).tolist() == (example.tokens == IDS["<|image_pad|>"]).tolist()
        start = example.tokens.tolist().index(IDS["<|vision_end|>"]) + 1
        assert TOKENIZER.decode(example.tokens[start:-2].tolist(), skip_special_tokens=False) == (text or "Describe the image.")


def test_the_given_tokenizer_is_left_alone():
    tokenizer = train_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    example = Processor(tokenizer, CONFIG).document({"text": "a red car"})
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
        PROCESSOR.document({"image": noise(*size[::-1])}),
        PROCESSOR.query({"text": text}),
    ]
    meta = 3  # count on as text
    batch = collate([[RowItem(example, meta, meta)] for example in examples], Size(200, 4 * 64 * 16, meta), LAYOUT)
    mask = batch.segments > 0
    kinds = (batch.tokens == IDS["<|image_pad|>"]) & mask
    grids = [[1, *(2 * side for side in grid(noise(*shape)))] for shape in (size, size[::-1])]
    positions, _ = reference.get_rope_index(
        model,
        torch.tensor(batch.tokens).long(),
        torch.tensor(kinds.astype(np.int32)),
        torch.tensor(grids),
        attention_mask=torch.tensor(mask.astype(np.int32)),
    )
    expected = positions.numpy().transpose(1, 0, 2)
    kept = np.broadcast_to(mask[:, None], expected.shape)
    np.testing.assert_array_equal(batch.positions[kept], expected[kept])


def test_image_tokens_point_at_their_units():
    image = noise(28 * 7, 28 * 5)
    example = PROCESSOR.document({"image": image, "text": "a"})
    assert grid(image) == (5, 7)
    tokens = example.visual >= 0
    corners = example.patch_arrays["patch_positions"].reshape(-1, 4, 2)[example.visual[tokens], 0] // 2
    np.testing.assert_array_equal(corners, np.stack(np.divmod(np.arange(35), 7), axis=1))
    start = np.flatnonzero(tokens)[0]
    np.testing.assert_array_equal(example.positions[1:, tokens].T - start, corners)


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1, max_size=60) | st.text(alphabet=" \n\te\u0301漢👩‍", min_size=1, max_size=60), st.integers(0, 40))
def test_truncation_cuts_only_the_end_of_the_users_text(text, spare):
    image = noise(56, 84)
    for side in (PROCESSOR.query, PROCESSOR.document):
        for item in ({"text": text}, {"text": text, "image": image}):
            limit = len(whole_prompt(side, "", item.get("image"))) + spare
            example = getattr(within(limit, side.__name__, 1024 * ("image" in item)), side.__name__)(item)
            full, cut = side(item).tokens.tolist(), example.tokens.tolist()
            assert len(cut) <= limit and not example.shrunk
            assert example.cut == len(full) - len(cut)
            if len(full) <= limit:
                assert cut == full
            else:
                assert cut in [whole_prompt(side, text[:n], item.get("image")) for n in range(len(text))]


def whole_prompt(side, text, image):
    prefix, end = ("Query: ", QUERY_END) if side == PROCESSOR.query else ("", END)
    return whole(f"<|im_start|>user\n{visual(image) if image else ''}{prefix}{text}{end}")


def test_truncation_keeps_the_most_that_fits():
    words = "a red car " * 50
    fixed = len(PROCESSOR.document({"text": ""}).tokens)
    for room in (1, 7, 40):
        cut = within(fixed + room, "document").document({"text": words})
        assert len(cut.tokens) == fixed + room
    some = Processor(TOKENIZER, CONFIG, Limits(500, 1024, 5, 0, 0)).document({"text": words})
    assert len(some.tokens) == fixed + 5


def test_no_room_for_a_prompt_is_an_error():
    with pytest.raises(
        UserError, match="its prompt alone takes .* tokens, and config.rows.size leaves 8 for it; raise config.rows.size"
    ):
        within(8, "query")
    with pytest.raises(UserError, match="^query: config.rows.size leaves .* tokens and 63 patches for an image: .* 1 and 64"):
        Processor(TOKENIZER, CONFIG, Limits(100, 63, 9, 0, 0))
    with pytest.raises(UserError, match="^row 3: config.rows.size leaves .* tokens and 0 patches for an image"):
        Processor(TOKENIZER, CONFIG, Limits(100, 0, 9, 0, 0)).document({"image": noise(56, 56)}, name="row 3")


@settings(max_examples=60, deadline=None)
@given(
    st.none() | st.tuples(st.integers(1, 700), st.integers(1, 700)),
    st.text(max_size=30) | st.integers(0, 90).map(lambda words: "a red été " * words),
    st.sampled_from(["query", "document"]),
    st.none() | st.tuples(st.integers(60, 130), st.integers(1, 20).map(lambda slots: 64 * slots), st.integers(1, 60)),
)
def test_sizes_are_those_of_the_examples(image, text, side, limits):
    """Sizes are known without decoding, and the example fits any limits."""
    processor = PROCESSOR if limits is None else Processor(TOKENIZER, CONFIG, Limits(*limits, 16, 20))
    item = {"text": text} | ({} if image is None else {"image": noise(*image)})
    described = item if image is None else item | {"image": image}
    try:
        example = getattr(processor, side)(item)
    except UserError as error:
        with pytest.raises(UserError) as refused:
            processor.size(described, side, name=side)
        assert str(refused.value) == str(error)
        return
    size = processor.size(described, side)
    assert size == (len(example.tokens), example.patches, example.cut, example.shrunk)
    assert size == processor.size(item, side)
    if limits:
        assert size.tokens <= processor.limits.prompt(side) and size.patches <= limits[1]
    else:
        assert not size.cut and not size.shrunk


@pytest.mark.parametrize(
    "item, message",
    [
        ({}, "neither text nor image"),
        ({"text": None, "image": None}, "neither text nor image"),
        ({"text": b"bytes"}, "expected a string as text, not bytes"),
        ({"text": "\ud800"}, "not valid Unicode"),
        ({"image": b"junk"}, "cannot be read"),
        ({"image": Image.new("RGB", (900, 2))}, "over 200 times"),
    ],
)
def test_bad_items_are_named(item, message):
    with pytest.raises(UserError, match=f"^icons row 9.*{message}"):
        PROCESSOR.query(item, name="icons row 9")


def test_a_batch_is_the_one_that_the_network_reads():
    examples = [PROCESSOR.query({"text": "a red car"}), PROCESSOR.document({"image": noise(90, 200)})]
    items = [RowItem(examples[0], 2, 2), RowItem(examples[1], 5, 3)]
    batch = collate([[], items], Size(tokens=100, patches=256, vectors=6), LAYOUT)
    arrays = vars(batch) | batch.patch_arrays
    shapes = {key: (value.shape, value.dtype.name) for key, value in arrays.items() if key != "patch_arrays"}
    assert shapes == {
        "tokens": ((2, 100), "int32"),
        "segments": ((2, 100), "int32"),
        "positions": ((2, 3, 100), "int32"),
        "meta": ((2, 100), "int32"),
        "visual": ((2, 100), "int32"),
        "reads": ((2, 6), "int32"),
        "row": ((2,), "int32"),
        "patches": ((2, 256, 588), "uint8"),
        "patch_segments": ((2, 256), "int32"),
        "patch_positions": ((2, 256, 2), "int32"),
        "windows": ((2, 256), "int32"),
    }
    for name, array in examples[1].patch_arrays.items():
        np.testing.assert_array_equal(arrays[name][1, : len(array)], array)
    assert batch.reads[1, :5].tolist() == [*np.flatnonzero(batch.meta[1] >= 0)[:2], *np.flatnonzero(batch.meta[1] >= 0)[-3:]]


def test_a_tokenizer_of_another_family_is_refused():
    with pytest.raises(UserError, match="lacks .*image_pad"):
        Processor(Tokenizer(models.BPE()), CONFIG)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_tokens([AddedToken(token, special=False) for token in SPECIAL_TOKENS])
    with pytest.raises(UserError, match="does not mark .*image_pad"):
        Processor(tokenizer, CONFIG)
