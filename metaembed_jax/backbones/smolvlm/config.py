"""The architecture of SmolVLM (arXiv 2504.05299; transformers' `idefics3`); read from and written to a checkpoint's config.json."""

import dataclasses
from typing import Any, Self

from metaembed_jax.backbones import config_checks
from metaembed_jax.backbones.config import FamilyConfig, FamilyTextConfig
from metaembed_jax.backbones.siglip import SiglipConfig
from metaembed_jax.batch.items import ArraySpec, Layout
from metaembed_jax.errors import UserError

TITLE = "SmolVLM"
START, PAD, END, FRAME, IMAGE = "<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>"
GELU = "gelu_pytorch_tanh"
UNSET_TEXT = {"rms_norm_eps": 1e-5}  # what transformers' default text_config has in place of its class's defaults
ROW_TILES = 21
MOST_PATCHES = 32  # on a side of a tile, as released
SHARED = (19, 25, 29, 31)  # patches on a side for which transformers' rounding gives two patches the same position


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(SiglipConfig):
    """Fields of Hugging Face's `vision_config` of a tile; defaults are those of its class in transformers.

    `scale_factor` is next to `vision_config` there.
    """

    hidden_size: int = 1152
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    patch_size: int = 32
    scale_factor: int = 2

    @property
    def tile_units(self) -> int:
        """Visual tokens of a tile; each is a square of patches."""
        return (self.side // self.scale_factor) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(FamilyTextConfig):
    """Fields of Hugging Face's `text_config`, with the same names; defaults are those of its class in transformers."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    intermediate_size: int = 11008


@dataclasses.dataclass(frozen=True)
class Config(FamilyConfig):
    """The architecture: the fields of a config.json that define the network."""

    title = TITLE
    text_config: TextConfig
    vision_config: VisionConfig

    @classmethod
    def from_huggingface(cls, config: dict) -> Self:
        """Read the content of a checkpoint's config.json.

        Raises:
          UserError: a field has a value that no SmolVLM checkpoint has.
        """
        text, vision = config_checks.section(config, "text_config"), config_checks.section(config, "vision_config")
        rope = config_checks.rotary(text)
        heads = text.get("num_attention_heads", TextConfig.num_attention_heads)
        text = config_checks.without_null(text or UNSET_TEXT, "num_key_value_heads", "head_dim")
        text = {"num_key_value_heads": heads} | text | {"rope_theta": rope["rope_theta"]}
        text = config_checks.without_null(text, "rope_theta")
        vision = config_checks.without_null({"scale_factor": config.get("scale_factor")} | vision, "scale_factor")
        architecture = cls.pick(text, vision)
        architecture.check()
        head_width = architecture.text_config.head_width
        for name, value, known in (
            ("model_type of text", text.get("model_type", "llama"), ("llama",)),
            ("head_dim", text.get("head_dim", head_width), (head_width,)),
            ("attention_bias", text.get("attention_bias", False), (False,)),
            ("mlp_bias", text.get("mlp_bias", False), (False,)),
            ("rope_type", rope["rope_type"], ("default",)),
            ("hidden_act of text", text.get("hidden_act", "silu"), ("silu",)),
            ("hidden_act of vision", vision.get("hidden_act", GELU), (GELU,)),
            ("num_channels", vision.get("num_channels", 3), (3,)),
        ):
            config_checks.require(name, value, known, TITLE)
        return architecture

    def to_huggingface(self, vocabulary: int, token_ids: dict[str, int]) -> dict:
        """Return the content of config.json; inverse of `from_huggingface`."""
        text = dataclasses.asdict(self.text_config) | {"vocab_size": vocabulary, "model_type": "llama"}
        text |= {"rope_parameters": {"rope_type": "default", "rope_theta": text.pop("rope_theta")}}
        text |= {"bos_token_id": token_ids[START], "eos_token_id": token_ids[END], "pad_token_id": token_ids[PAD]}
        vision = self.stored_vision() | {"model_type": "idefics3_vision"}
        return {
            "model_type": "idefics3",
            "architectures": ["Idefics3Model"],
            "scale_factor": vision.pop("scale_factor"),
            "text_config": text,
            "vision_config": vision,
            "image_token_id": token_ids[IMAGE],
            "pad_token_id": token_ids[PAD],
        }

    def default_row(self, images: Any) -> tuple[int, int]:
        """Return room for two images of three tiles on a side, and a tile more, with their texts and Meta Tokens.

        As released: (1920, 21504). An image of the recipe takes 7 or 10 tiles, and they fill 96 % of 21; of rows of 10, 92 %.
        """
        vision = self.vision_config
        tokens = ROW_TILES * (vision.tile_units + 24)
        return tokens + -tokens % 128, ROW_TILES * vision.patches

    @property
    def layout(self) -> Layout:
        """The arrays of a batch: pixels, in whole tiles."""
        vision = self.vision_config
        patches = {"patches": ArraySpec((3 * vision.patch_size**2,), "uint8")}
        return Layout(patches, position_axes=1, unit=vision.scale_factor**2, multiple=vision.patches)

    def check(self) -> None:
        """Check that sizes fit each other."""
        text, vision = self.text_config, self.vision_config
        config_checks.check_depth(text.num_hidden_layers, vision.num_hidden_layers)
        config_checks.check_heads("text_config", text.hidden_size, text.num_attention_heads, multiple=2)
        config_checks.check_key_value_heads(text.num_attention_heads, text.num_key_value_heads)
        config_checks.check_heads("vision_config", vision.hidden_size, vision.num_attention_heads)
        if vision.image_size % 2:  # processors round sides up to even numbers, which could add a tile
            raise UserError(f"vision_config: image_size is {vision.image_size}; expected an even number")
        side = f"an image_size of {vision.image_size} has {vision.side} patches of patch_size {vision.patch_size} on a side"
        if not 0 < vision.side <= MOST_PATCHES or vision.side in SHARED:
            raise UserError(f"vision_config: {side}; expected 1 to {MOST_PATCHES} except {', '.join(map(str, SHARED))}")
        if vision.side % vision.scale_factor:
            raise UserError(f"vision_config: {side}; expected a multiple of scale_factor, {vision.scale_factor}")
