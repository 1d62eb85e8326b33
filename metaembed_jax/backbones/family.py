"""A family of backbones as one value: everything that the rest of the library knows of it."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from metaembed_jax.backbones.config import FamilyConfig
from metaembed_jax.backbones.flop_counts import FlopCount
from metaembed_jax.backbones.weight_map import Source
from metaembed_jax.batch.items import Size
from metaembed_jax.errors import UserError
from metaembed_jax.inputs.processors import PromptProcessor

# The package of each `model_type` of a config.json; each has its `Family` under the name `FAMILY`.
FAMILIES = {
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "paligemma": "paligemma",
    "mllama": "llama_vision",
    "idefics3": "smolvlm",
}


class PixelBounds(Protocol):
    """The part of a run's `data` that may change how images become patches."""

    @property
    def min_pixels(self) -> int: ...

    @property
    def max_pixels(self) -> int: ...


class FamilyImages(Protocol):
    """How images become patches: a frozen dataclass of each family; `config` is the family's `Config`."""

    @classmethod
    def from_preprocessor(cls, preprocessor: dict, config: Any, max_visual_tokens: int) -> Self:
        """Read the content of a preprocessor_config.json."""
        ...

    @classmethod
    def from_run(cls, data: PixelBounds, config: Any, max_visual_tokens: int | None) -> Self:
        """Read the data of a run's config; no cap on the visual tokens of an image: None."""
        ...

    def to_preprocessor(self, config: Any) -> dict:
        """Return the content of a preprocessor_config.json that transformers reads."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """All that the rest of the library knows of a family. Names in capitals are classes.

    Parameters named `kernel` are those of `layers.Linear`s: they can carry adapters and be int8. A run's table of what trains names
    parameters by their paths.

    Attributes:
      Config: the architecture, from a config.json and back.
      Images: how images become patches.
      Processor: (tokenizer, images, limits) -> items to `batch.items.Example`s.
      Backbone: (config, *, rngs) -> a `backbone.Backbone`, the network.
      special_tokens: special tokens of a vocabulary made from scratch.
      pad_token: the token that an export names as padding.
      prompt_words: strings around the texts of prompts, for vocabularies made from scratch.
      weight_map: the tensor that each parameter is read from.
      unused_keys: tensors of checkpoints that no parameter is read from.
      canonical_key: the name in `weight_map` of a tensor of any layout in circulation.
      stored_key: the name in transformers' model of a tensor of `weight_map`; inverse of `canonical_key`.
      flop_counts: (config, row) -> the arithmetic of a row.
      usage: text of a model card: how stock transformers computes the vectors.
      sentence_transformers: the file of a module for sentence-transformers; None: there is no such module.
    """

    Config: type[FamilyConfig]
    Images: type[FamilyImages]
    Processor: type[PromptProcessor]
    Backbone: Callable[..., Any]
    special_tokens: tuple[str, ...]
    pad_token: str
    prompt_words: tuple[str, ...]
    weight_map: Mapping[str, Source]
    unused_keys: tuple[str, ...]
    canonical_key: Callable[[str], str]
    stored_key: Callable[[str], str]
    flop_counts: Callable[[Any, Size], tuple[FlopCount, ...]]
    usage: str
    sentence_transformers: Path | None = None

    @property
    def title(self) -> str:
        """The family's name in messages."""
        return self.Config.title

    @property
    def embedding_key(self) -> str:
        """The tensor of the vocabulary."""
        return self.weight_map["embedding"].key


def family(name: str) -> Family:
    """Return the family of a `model_type`.

    Raises:
      UserError: no such family.
    """
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"unknown backbone {name!r}; known: {', '.join(sorted(FAMILIES))}")
    return importlib.import_module(f"metaembed_jax.backbones.{FAMILIES[name]}").FAMILY
