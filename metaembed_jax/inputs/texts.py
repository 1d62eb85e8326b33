"""Prompts as tokens of a checkpoint's vocabulary. Special tokens come only from the prompt, and only the user's text is cut."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Encoding, Tokenizer

from metaembed_jax.errors import UserError

QUERY = "Query: "  # before the text of a query
IMAGE_ALONE = "Describe the image."  # the text of an image without one


class PromptTokenizer:
    """A tokenizer of a family's prompts. Can be pickled, for worker processes.

    Args:
      tokenizer: a checkpoint's; it is copied.
      special_tokens: those of the prompts.
      title: name of the family, for errors.

    Attributes:
      ids: ids of the special tokens.

    Raises:
      UserError: the tokenizer lacks a special token, or does not mark it as special.
    """

    def __init__(self, tokenizer: Tokenizer, special_tokens: Sequence[str], title: str):
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy, because the next lines change it
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._encoded: dict[str, list[int]] = {}
        # Special strings in a text are plain text. Set once, because several threads encode at the same time.
        self._tokenizer.encode_special_tokens = True
        ids = {token: self._tokenizer.token_to_id(token) for token in special_tokens}
        if missing := [token for token, number in ids.items() if number is None]:
            raise UserError(f"the tokenizer lacks {', '.join(missing)}; use a {title} tokenizer.json")
        self.ids: dict[str, int] = {token: number for token, number in ids.items() if number is not None}
        if loose := [token for token, number in self.ids.items() if number in self.encode(token)]:
            raise UserError(f"the tokenizer does not mark {', '.join(loose)} as special; use a {title} tokenizer.json")

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = True  # pickling drops it

    def to_str(self) -> str:
        """Return the tokenizer as JSON."""
        return self._tokenizer.to_str()

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a prompt's own words, from a cache; special strings in them are plain text."""
        if text not in self._encoded:
            self._encoded[text] = self._encode(text).ids
        return list(self._encoded[text])

    def fit(self, before: str, text: str, after: str, room: int | None, name: str) -> list[int]:
        """Return the tokens of before + text + after as one string (merges may cross the seams), at most `room`.

        A cut text has exactly the tokens of a shorter text, so the words around it stay complete, whatever tokens merge.

        Args:
          room: the most tokens; None for any number.
          name: name of the item, for errors.

        Raises:
          UserError: the text is not valid Unicode, or the words around it do not fit.
        """
        encoding = self._encode_text(before + text + after, name)
        while room is not None and (excess := len(encoding.ids) - room) > 0:
            if not text:
                raise UserError(f"{name}: its prompt alone is {excess} tokens over the limit of {room}; raise config.rows.size")
            # The starts of the tokens before `after`; there are none if a normalizer drops the whole string.
            starts = [start for start, _ in encoding.offsets if start < len(before) + len(text)] or [len(before)]
            start = starts[max(len(starts) - excess, 0)] - len(before)
            text = text[: max(0, min(start, len(text) - 1))]
            encoding = self._encode(before + text + after)
        return encoding.ids

    def _encode_text(self, text: str, name: str) -> Encoding:
        try:
            return self._encode(text)
        except TypeError:  # a lone surrogate
            raise UserError(f"{name}: the text is not valid Unicode (a lone surrogate); decode it again") from None

    def _encode(self, text: str) -> Encoding:
        return self._tokenizer.encode(text, add_special_tokens=False)


def meta_token_names(query_tokens: int, document_tokens: int) -> list[str]:
    """Return the strings of Meta Tokens in the vocabulary of an export, those of queries first."""
    sides = (("query", query_tokens), ("document", document_tokens))
    return [f"<|meta_{side}_{number}|>" for side, count in sides for number in range(count)]


def read_item(item: dict, name: str) -> tuple[str, Any]:
    """Return (text, image or None) of {"text": str, "image": ...}; an absent text is empty.

    Raises:
      UserError: other keys, neither text nor image, or a text that is not a string.
    """
    if unknown := item.keys() - {"text", "image"}:
        raise UserError(f"{name}: unknown keys {', '.join(sorted(map(repr, unknown)))}; allowed: text, image")
    text, image = item.get("text"), item.get("image")
    if text is None and image is None:
        raise UserError(f"{name} has neither text nor image; give at least one")
    if text is not None and not isinstance(text, str):
        raise UserError(f"{name}: expected a string as text, not {type(text).__name__}")
    return text or "", image
