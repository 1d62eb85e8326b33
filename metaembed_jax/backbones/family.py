"""A family of backbones as one value: everything that the rest of the library uses of it."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from metaembed_jax.backbones.config import FamilyConfig
from metaembed_jax.backbones.flop_counts import FlopCount
from metaembed_jax.backbones.weight_map import Source
from metaembed_jax.batch.items import Size
from metaembed_jax.errors import UserError, shortened
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
    """The keys of a run's `data` that may change how images become patches."""

    @property
    def min_pixels(self) -> int: ...

    @property
    def max_pixels(self) -> int: ...


class FamilyImages(Protocol):
    """The processing of images into patches: a frozen dataclass of each family; `config` is the family's `Config`."""

    @classmethod
    def from_preprocessor(cls, preprocessor: dict, config: Any, max_visual_tokens: int) -> Self:
        """Read the content of a preprocessor_config.json."""
        ...

    @classmethod
    def from_run(cls, data: PixelBounds, config: Any, max_visual_tokens: int | None) -> Self:
        """Read the data of a run's config. `max_visual_tokens` is the most visual tokens of an image; None: any number."""
        ...

    def to_preprocessor(self, config: Any) -> dict:
        """Return the content of a preprocessor_config.json that transformers reads."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family of backbones. Attributes with capitals are classes.

    Parameters named `kernel` belong to `layers.Linear`s: they can have adapters and be int8. `config.model.trained` names
    parameters by their paths.

    Attributes:
      Config: the architecture, read from a config.json and written to one.
      Images: how images become patches.
      Processor: (tokenizer, images, limits) -> a processor that makes `batch.items.Example`s of items.
      Backbone: (config, *, rngs) -> a `backbone.Backbone`, the network.
      special_tokens: special tokens of a vocabulary made from scratch.
      pad_token: the token that an export names as padding.
      prompt_words: strings around the texts of prompts, for vocabularies made from scratch.
      weight_map: the tensor that each parameter is read from.
      unused_keys: tensors of checkpoints that no parameter is read from.
      canonical_key: from the name of a tensor in any known layout to its name in `weight_map`.
      stored_key: from the name of a tensor in `weight_map` to its name in transformers' model; inverse of `canonical_key`.
      flop_counts: (config, row) -> the FLOP counts of a row.
      usage: text of a model card, which shows how stock transformers computes the vectors.
      sentence_transformers: the file of a module for sentence-transformers; None if there is no such module.
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
        """Name of the tensor of the vocabulary."""
        return self.weight_map["embedding"].key


def family(name: object, key: str = "config.model.backbone") -> Family:
    """Return the family of a `model_type`.

    Args:
      key: the key that holds the name, for errors.

    Raises:
      UserError: the family is unknown.
    """
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{key}={shortened(name)}: expected {', '.join(sorted(FAMILIES))}")
    return importlib.import_module(f"metaembed_jax.backbones.{FAMILIES[name]}").FAMILY
