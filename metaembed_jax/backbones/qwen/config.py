"""The fields and checks that the architectures of the Qwen-VL families share."""

import dataclasses
from pathlib import Path
from typing import Any, Self

from metaembed_jax.backbones.config import CLIP_MEAN, CLIP_STD, FamilyConfig, FamilyTextConfig, FamilyVisionConfig
from metaembed_jax.backbones.config_checks import check_depth, check_heads, check_key_value_heads, check_sizes
from metaembed_jax.errors import UserError

WORDS = 192  # tokens of a row for an image's text and Meta Tokens
SMALLEST_ROW = 640  # holds a text of 512 tokens with its prompt and Meta Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenVisionConfig(FamilyVisionConfig):
    """Fields of Hugging Face's `vision_config`, with the same names."""

    depth: int
    num_heads: int
    out_hidden_size: int
    spatial_merge_size: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenTextConfig(FamilyTextConfig):
    """Fields of Hugging Face's `text_config`, with the same names."""

    mrope_section: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class QwenConfig(FamilyConfig):
    """Base class of the Qwen-VL architectures."""

    text_config: QwenTextConfig
    vision_config: QwenVisionConfig

    unset_pixels = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}

    def default_row(self, images: Any) -> tuple[int, int]:
        """Return room for two of the largest images, with a text each. As released: (2432, 8192).

        The recipe's mixture fills 98 % of the tokens of such rows and 97 % of the patches; of rows of one image, 74 and 89 %.
        """
        units = images.max_pixels // images.unit_size**2
        tokens, patches = max(2 * (units + WORDS), SMALLEST_ROW), 2 * units * self.layout.unit
        return tokens + -tokens % 128, patches + -patches % self.layout.multiple

    def with_preprocessor(self, preprocessor: dict, file: Path) -> Self:
        """Replace the mean and deviation of pixels by those of a preprocessor_config.json.

        Raises:
          UserError: they are not three numbers each, or the sizes of patches are not this model's; the error names `file`.
        """
        check_sizes({key: preprocessor.get(key) for key in ("patch_size", "merge_size")})
        vision = self.vision_config
        ours = (preprocessor.get("patch_size") or 14, preprocessor.get("merge_size") or 2)  # transformers' defaults
        if ours != (theirs := (vision.patch_size, vision.spatial_merge_size)):
            raise UserError(f"{file}: patch and merge sizes are {ours} in preprocessor_config.json and {theirs} in config.json")
        return super().with_preprocessor(preprocessor, file)

    def check(self) -> None:
        """Check that sizes fit each other.

        Raises:
          UserError: they do not; the error names the fields and their values.
        """
        text, vision = self.text_config, self.vision_config
        check_depth(text.num_hidden_layers, vision.depth)
        check_key_value_heads(text.num_attention_heads, text.num_key_value_heads)
        if len(text.mrope_section) != 3 or 2 * sum(text.mrope_section) != text.head_width:
            expected = f"three numbers that add up to half a head's width, {text.head_width}"
            raise UserError(f"text_config: mrope_section is {text.mrope_section}; expected {expected}")
        check_heads("vision_config", vision.hidden_size, vision.num_heads, multiple=4)
        if vision.out_hidden_size != text.hidden_size:
            raise UserError(
                f"vision_config: out_hidden_size is {vision.out_hidden_size}; expected the text's hidden_size, {text.hidden_size}"
            )


def with_heads(text: dict) -> dict:
    """Return a text_config with as many key-value heads as attention heads, if their number is null."""
    heads = text.get("num_key_value_heads", 0)
    return text if heads is not None else {**text, "num_key_value_heads": text.get("num_attention_heads")}


def token_fields(token_ids: dict[str, int], vocabulary: int) -> dict[str, int]:
    """Return the fields of a config.json that name the tokens of images."""
    return {
        "image_token_id": token_ids["<|image_pad|>"],
        "video_token_id": token_ids.get("<|video_pad|>", vocabulary),  # the default is an id that no token has
        "vision_start_token_id": token_ids["<|vision_start|>"],
        "vision_end_token_id": token_ids["<|vision_end|>"],
    }
