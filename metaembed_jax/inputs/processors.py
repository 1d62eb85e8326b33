"""Queries and candidates to examples: what the processors of all families share."""

from typing import ClassVar

from tokenizers import Tokenizer

from metaembed_jax.inputs.examples import Example
from metaembed_jax.inputs.texts import QUERY, PromptTokenizer


class PromptProcessor:
    """A base for what turns items into examples with a checkpoint's tokenizer. Survives pickling, for worker processes.

    Args:
      tokenizer: the checkpoint's.
      images: how images become patches: the family's `Images`.
    """

    title: ClassVar[str]  # of the family
    special_tokens: ClassVar[tuple[str, ...]]  # of its prompts
    filler: ClassVar[str]  # the special token that ten times ends a query, before a line's end

    def __init__(self, tokenizer: Tokenizer, images: object):
        self.images = images
        self._tokenizer = PromptTokenizer(tokenizer, self.special_tokens, self.title)
        self._end_of_query = [self._tokenizer.ids[self.filler]] * 10 + self._tokenizer.encode("\n")

    def query(self, item: dict, *, max_tokens: int | None = None, name: str = "query") -> Example:
        """An item of the query side: {"text": str, "image": PIL image or encoded bytes}, either or both.

        Args:
          item: text that is empty beside an image counts as absent. Special strings in it are plain text.
          max_tokens: what is longer loses the end of the user's text, never prompt or image tokens.
          name: of the item, for errors.

        Raises:
          UserError: nothing to encode, an unreadable image, or no room for prompt and image.
        """
        return self._example(item, QUERY, self._end_of_query, max_tokens, name)

    def candidate(self, item: dict, *, max_tokens: int | None = None, name: str = "candidate") -> Example:
        """An item of the candidate side; otherwise as `query`."""
        return self._example(item, "", [], max_tokens, name)

    def _example(self, item: dict, prefix: str, suffix: list[int], max_tokens: int | None, name: str) -> Example:
        """A family's own: the prompt has `prefix` before the text, and `suffix` at its end."""
        raise NotImplementedError
