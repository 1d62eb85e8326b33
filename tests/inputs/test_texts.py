"""Tokens of a prompt: one string; only the end of the user's text is cut."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from metaembed_jax.errors import UserError
from metaembed_jax.inputs.texts import PromptTokenizer, read_item

SPECIAL = ("<s>", "<image>")


def train():
    """Train a byte-level BPE that merges text with the words around it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=list(SPECIAL), initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(["Query: a red car\n", "Query: the car\n", "a red\n", "漢字\n"] * 3, trainer)
    return tokenizer


TOKENIZER = train()
PROMPTS = PromptTokenizer(TOKENIZER, SPECIAL, "Small")
TEXTS = st.text(max_size=30) | st.text(alphabet=" a redcr\n漢字é", max_size=60)


def whole(text):
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def test_what_stands_around_a_text_merges_with_it():
    assert len(whole("Query: a red car\n")) < sum(map(len, map(whole, ("Query: ", "a red car", "\n"))))
    assert PROMPTS.fit("Query: ", "a red car", "\n", None, "x") == whole("Query: a red car\n")


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.sampled_from(["", "Query: "]), st.sampled_from(["", "\n", " car\n"]), st.integers(0, 30))
def test_a_cut_leaves_the_tokens_of_a_shorter_text_and_all_around_it(text, before, after, spare):
    if any(token in text for token in SPECIAL):
        return
    room, full = len(whole(before + after)) + spare, whole(before + text + after)
    cut = PROMPTS.fit(before, text, after, room, "x")
    assert len(cut) <= room
    assert cut == full if len(full) <= room else cut in [whole(before + text[:n] + after) for n in range(len(text))]


def test_a_cut_keeps_about_the_most_that_fits():
    text = "a red car " * 40
    for after in ("", "\n"):
        around = len(whole("Query: " + after))
        for spare in (3, 10, 41):
            assert len(PROMPTS.fit("Query: ", text, after, around + spare, "x")) >= around + spare - 2


def test_no_room_for_what_stands_around_is_named():
    excess = len(whole("Query: \n"))
    for room, over in ((0, excess), (-3, excess + 3)):
        with pytest.raises(UserError, match=f"^row 3: its prompt alone is {over} tokens over the limit of"):
            PROMPTS.fit("Query: ", "a red car", "\n", room, "row 3")
    with pytest.raises(UserError, match="^row 3: the text is not valid Unicode"):
        PROMPTS.fit("", "\ud800", "", None, "row 3")


def test_special_strings_of_the_user_stay_text_in_other_processes_too():
    for prompts in (PROMPTS, pickle.loads(pickle.dumps(PROMPTS))):
        tokens = prompts.encode("a<image><s>")
        assert not set(tokens) & set(prompts.ids.values()) and TOKENIZER.decode(tokens) == "a<image><s>"
        assert prompts.ids == {token: TOKENIZER.token_to_id(token) for token in SPECIAL}


def test_the_given_tokenizer_is_copied():
    tokenizer = train()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    assert PromptTokenizer(tokenizer, SPECIAL, "Small").encode("a long red car") == whole("a long red car")
    assert tokenizer.truncation and tokenizer.padding and not tokenizer.encode_special_tokens


def test_a_tokenizer_of_another_family_is_refused():
    with pytest.raises(UserError, match="lacks <s>, <image>; use a Small tokenizer.json"):
        PromptTokenizer(Tokenizer(models.BPE()), SPECIAL, "Small")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_tokens([AddedToken(token, special=False) for token in SPECIAL])
    with pytest.raises(UserError, match="does not mark <s>, <image> as special"):
        PromptTokenizer(tokenizer, SPECIAL, "Small")


@pytest.mark.parametrize(
    "item, message",
    [
        ({}, "neither text nor image"),
        ({"text": None, "image": None}, "neither text nor image"),
        ({"text": b"bytes"}, "expected a string as text, not bytes"),
        ({"text": "a", "images": []}, "unknown keys 'images'; allowed: text, image"),
    ],
)
def test_items_that_are_none_are_named(item, message):
    with pytest.raises(UserError, match=f"^row 9.*{message}"):
        read_item(item, "row 9")


def test_an_absent_text_is_empty():
    assert read_item({"text": None, "image": 5}, "x") == ("", 5) and read_item({"text": "a"}, "x") == ("a", None)
