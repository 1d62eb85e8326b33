"""Base classes of architectures: the fields of a config.json that every family has, and the methods that the library calls.

The subclasses of a family add fields, and have the defaults of its classes in transformers, which need not write what equals them.
"""

import abc
import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Self

from metaembed_jax.backbones.config_checks import normalisation, pick, section
from metaembed_jax.batch.items import Layout

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyTextConfig:
    """Fields of Hugging Face's `text_config`, with the same names."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyVisionConfig:
    """Fields of Hugging Face's `vision_config`, with the same names, and the fields on pixels of preprocessor_config.json."""

    hidden_size: int
    intermediate_size: int
    patch_size: int
    image_mean: tuple[float, float, float] = HALF
    image_std: tuple[float, float, float] = HALF


@dataclasses.dataclass(frozen=True)
class FamilyConfig(abc.ABC):
    """The architecture: the fields of a config.json that define the network. A base class."""

    text_config: FamilyTextConfig
    vision_config: FamilyVisionConfig

    title: ClassVar[str]  # the family's name in messages
    ties_output: ClassVar[bool] = False  # transformers' default for `tie_word_embeddings`
    unset_pixels: ClassVar[dict] = {"image_mean": HALF, "image_std": HALF}  # transformers' defaults for a preprocessor_config.json

    @classmethod
    def pick(cls, text: dict, vision: dict) -> Self:
        """Read the content of `text_config` and `vision_config` in a config.json.

        Raises:
          UserError: a field has an invalid value.
        """
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}
        sections = {"text_config": text, "vision_config": vision}
        return cls(**{name: pick(kinds[name], values, name, cls.title) for name, values in sections.items()})

    @classmethod
    def is_tied(cls, config: dict) -> bool:
        """Return whether the output layer of a checkpoint is its embedding table, by the content of its config.json."""
        values = [part.get("tie_word_embeddings") for part in (config, section(config, "text_config"))]
        stored = [value for value in values if value is not None]
        return any(stored) if stored else cls.ties_output

    @classmethod
    @abc.abstractmethod
    def from_huggingface(cls, config: dict) -> Self:
        """Read the content of a checkpoint's config.json, and check all of it (see `config_checks`).

        Also reads the fields of this class as a dict, which is `config.model.architecture` of a run.

        Raises:
          UserError: a field is missing, or has a value that no checkpoint of the family has.
        """

    @abc.abstractmethod
    def to_huggingface(self, vocabulary: int, token_ids: dict[str, int]) -> dict:
        """Return the content of config.json; inverse of `from_huggingface`.

        Args:
          vocabulary: rows of the embedding table, which may be more than in this config.
          token_ids: ids of all added tokens.
        """

    @abc.abstractmethod
    def check(self) -> None:
        """Check that sizes fit each other.

        Raises:
          UserError: they do not; the error names the fields and their values.
        """

    @property
    @abc.abstractmethod
    def layout(self) -> Layout:
        """The arrays of a batch that depend on the family."""

    @abc.abstractmethod
    def default_row(self, images: Any) -> tuple[int, int]:
        """Return the default tokens and patches of a packed row.

        Args:
          images: how images become patches: the family's `Images`.
        """

    @property
    def width(self) -> int:
        """Width of the language model's states."""
        return self.text_config.hidden_size

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding table."""
        return self.text_config.vocab_size

    def with_preprocessor(self, preprocessor: dict, file: Path) -> Self:
        """Replace the mean and deviation of pixels by those that transformers reads from a preprocessor_config.json.

        Args:
          file: path of the preprocessor_config.json, for errors.

        Raises:
          UserError: they are not three numbers each.
        """
        pixels = self.unset_pixels | normalisation(preprocessor, file, self.title)
        return dataclasses.replace(self, vision_config=dataclasses.replace(self.vision_config, **pixels))

    def stored_vision(self) -> dict:
        """Return the content of `vision_config` in a config.json, which has no mean and deviation of pixels."""
        fields = dataclasses.asdict(self.vision_config)
        return {key: value for key, value in fields.items() if key not in ("image_mean", "image_std")}

    def stored_pixels(self) -> dict:
        """Return the keys of pixels in preprocessor_config.json; inverse of `with_preprocessor`."""
        vision = self.vision_config
        return {"image_mean": list(vision.image_mean), "image_std": list(vision.image_std), "rescale_factor": 1 / 255}
