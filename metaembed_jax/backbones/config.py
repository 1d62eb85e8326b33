"""What the configs of all families share."""

import dataclasses
from pathlib import Path
from typing import ClassVar, Self

from metaembed_jax.backbones.fields import normalisation, pick

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


class FamilyConfig:
    """A base for frozen dataclasses of a `text_config` and a `vision_config`; `title` is the family's name.

    The former has a `hidden_size` and a `vocab_size`, the latter `image_mean` and `image_std`.
    """

    title: ClassVar[str]
    unset_pixels: ClassVar[dict] = {"image_mean": HALF, "image_std": HALF}  # of transformers' class, where a preprocessor sets none

    @classmethod
    def pick(cls, text: dict, vision: dict) -> Self:
        """From the content of `text_config` and `vision_config` in a config.json.

        Raises:
          UserError: a field is missing or cannot be.
        """
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}
        given = {"text_config": text, "vision_config": vision}
        return cls(**{name: pick(kinds[name], values, name, cls.title) for name, values in given.items()})

    def default_row(self, images: object) -> tuple[int, int]:
        """A family's own: tokens and patches of a packed row, where nothing else is asked for.

        Args:
          images: how images become patches: the family's `Images`.
        """
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Of the states of the language model."""
        return self.text_config.hidden_size

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding table."""
        return self.text_config.vocab_size

    def stored_vision(self) -> dict:
        """The content of `vision_config` in a config.json, where pixels' mean and deviation have no place."""
        return {
            key: value for key, value in dataclasses.asdict(self.vision_config).items() if key not in ("image_mean", "image_std")
        }

    def with_preprocessor(self, preprocessor: dict, place: Path) -> Self:
        """With the mean and deviation of pixels that transformers reads in a preprocessor_config.json.

        Args:
          place: of the preprocessor, for errors.

        Raises:
          UserError: they are none.
        """
        pixels = self.unset_pixels | normalisation(preprocessor, place, self.title)
        return dataclasses.replace(self, vision_config=dataclasses.replace(self.vision_config, **pixels))
