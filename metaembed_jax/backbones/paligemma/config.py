"""The architecture of PaliGemma 1 and 2 (arXiv 2407.07726, 2412.03555); read from and written to a checkpoint's config.json."""

import dataclasses
from typing import Any, Self

from metaembed_jax.backbones import config_checks
from metaembed_jax.backbones.config import FamilyConfig, FamilyTextConfig
from metaembed_jax.backbones.siglip import SiglipConfig
from metaembed_jax.batch.items import ArraySpec, Layout
from metaembed_jax.errors import UserError

TITLE = "PaliGemma"
PAD_TOKEN, START_TOKEN, IMAGE_TOKEN = "<pad>", "<bos>", "<image>"
GELU = "gelu_pytorch_tanh"
# Defaults of Gemma 2, where they are not Gemma's, and of sections that are absent.
GEMMA2 = dict(hidden_size=2304, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4, intermediate_size=9216)
UNSET_TEXT = dict(
    vocab_size=257152, hidden_size=2048, num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1, intermediate_size=16384
)
UNSET_VISION = dict(hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, intermediate_size=4096, patch_size=14)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(FamilyTextConfig):
    """Fields of Hugging Face's `text_config`, with the same names; defaults are those of its classes in transformers.

    Only Gemma 2, the `model_type` "gemma2", uses the last three.
    """

    model_type: str = "gemma"
    vocab_size: int = 256000
    hidden_size: int = 3072
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    intermediate_size: int = 24576
    head_dim: int = 256
    query_pre_attn_scalar: float = 256
    attn_logit_softcapping: float = 50.0
    sliding_window: int = 4096

    @property
    def is_gemma2(self) -> bool:
        """True where scores are capped, every other layer is local, and norms follow attention and feed-forward too."""
        return self.model_type == "gemma2"

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.head_dim


@dataclasses.dataclass(frozen=True)
class Config(FamilyConfig):
    """The architecture: the fields of a config.json that define the network."""

    title = TITLE
    ties_output = True
    text_config: TextConfig
    vision_config: SiglipConfig

    @classmethod
    def from_huggingface(cls, config: dict) -> Self:
        """Read the content of a checkpoint's config.json.

        Raises:
          UserError: a field has a value that no PaliGemma checkpoint has.
        """
        text, vision = config_checks.section(config, "text_config"), config_checks.section(config, "vision_config")
        rope = config_checks.rotary(text)
        text = {"model_type": "gemma"} | (text or UNSET_TEXT) | {"rope_theta": rope["rope_theta"]}
        text = config_checks.without_null((GEMMA2 if text["model_type"] == "gemma2" else {}) | text, "rope_theta")
        vision = vision or UNSET_VISION
        architecture = cls.pick(text, vision)
        for name, value, known in (
            ("model_type of text", text["model_type"], ("gemma", "gemma2")),
            ("attention_bias", text.get("attention_bias") or False, (False,)),
            ("rope_type", rope["rope_type"], ("default",)),
            ("hidden_act of vision", vision.get("hidden_act", GELU), (GELU,)),
            ("num_channels", vision.get("num_channels", 3), (3,)),
            ("projection_dim", config.get("projection_dim", architecture.width), (architecture.width,)),
            *_fixed(text, architecture.text_config),
        ):
            config_checks.require(name, value, known, TITLE)
        architecture.check()
        return architecture

    def to_huggingface(self, vocabulary: int, token_ids: dict[str, int]) -> dict:
        """Return the content of config.json; inverse of `from_huggingface`."""
        text = dataclasses.asdict(self.text_config) | {"vocab_size": vocabulary}
        text |= {"pad_token_id": token_ids[PAD_TOKEN], "bos_token_id": token_ids[START_TOKEN]}
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
        if self.text_config.is_gemma2:
            text["layer_types"] = layer_types(self.text_config.num_hidden_layers)
        else:
            for key in ("query_pre_attn_scalar", "attn_logit_softcapping", "sliding_window"):
                text.pop(key)
        vision = self.stored_vision() | {"model_type": "siglip_vision_model", "vision_use_head": False}
        return {
            "model_type": "paligemma",
            "architectures": ["PaliGemmaModel"],
            "text_config": text,
            "vision_config": vision | {"projection_dim": self.width},
            "projection_dim": self.width,
            "hidden_size": self.width,
            "image_token_index": token_ids[IMAGE_TOKEN],
        }

    def default_row(self, images: Any) -> tuple[int, int]:
        """Return room for two images with usual texts and their Meta Tokens, or one with the longest text.

        Of 448 pixels: (2432, 2048). The recipe's items fill 97 % of the tokens, and all patches; of rows of one image, 84 %.
        """
        patches = self.vision_config.patches
        tokens = max(2 * (patches + 192), patches + 640)
        return tokens + -tokens % 128, 2 * patches

    @property
    def layout(self) -> Layout:
        """The arrays of a batch: pixels; every image has the same number of patches, and each is a visual token."""
        vision = self.vision_config
        patches = {"patches": ArraySpec((3 * vision.patch_size**2,), "uint8")}
        return Layout(patches, position_axes=1, unit=1, multiple=vision.patches)

    def check(self) -> None:
        """Check that sizes fit each other."""
        text, vision = self.text_config, self.vision_config
        config_checks.check_depth(text.num_hidden_layers, vision.num_hidden_layers)
        config_checks.check_key_value_heads(text.num_attention_heads, text.num_key_value_heads)
        if text.head_dim % 2:
            raise UserError(f"text_config: head_dim {text.head_dim} is odd; expected an even number, for pairs of rotary angles")
        config_checks.check_heads("vision_config", vision.hidden_size, vision.num_attention_heads)
        if vision.image_size % vision.patch_size:
            raise UserError(
                f"vision_config: image_size is {vision.image_size}; expected a multiple of patch_size, {vision.patch_size}"
            )


def _fixed(text: dict, config: TextConfig) -> list[tuple[str, object, tuple]]:
    """Return (name, value, known values) of the fields that one version of Gemma has."""
    if not config.is_gemma2:
        return [("hidden_act of text", text.get("hidden_act", GELU), (GELU, "gelu"))]  # the two mean the same here
    alternating = layer_types(config.num_hidden_layers)
    return [
        ("hidden_activation", text.get("hidden_activation", GELU), (GELU,)),
        ("layer_types", text.get("layer_types") or alternating, (alternating,)),
        *(
            (key, text.get(key, getattr(config, key)), (getattr(config, key),))
            for key in ("attn_logit_softcapping", "sliding_window")
        ),
    ]


def layer_types(layers: int) -> list[str]:
    """Return the kinds of Gemma 2's layers, which alternate from a local one."""
    return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
