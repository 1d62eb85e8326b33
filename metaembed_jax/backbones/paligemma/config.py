"""The architecture of PaliGemma 1 and 2 (arXiv 2407.07726, 2412.03555), from a checkpoint's config.json and back."""

import dataclasses

from metaembed_jax.backbones import fields
from metaembed_jax.backbones.config import HALF, FamilyConfig
from metaembed_jax.batch.items import ArraySpec, Layout
from metaembed_jax.errors import UserError

TITLE = "PaliGemma"
PAD_TOKEN, START_TOKEN, IMAGE_TOKEN = "<pad>", "<bos>", "<image>"
GELU = "gelu_pytorch_tanh"


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The fields of Hugging Face's `vision_config`, under their names there; defaults are those of its class in transformers."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int = 224
    patch_size: int = 16
    layer_norm_eps: float = 1e-6
    image_mean: tuple[float, float, float] = HALF
    image_std: tuple[float, float, float] = HALF

    @property
    def patches(self) -> int:
        """Of every image, and so its visual tokens."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The fields of Hugging Face's `text_config`, under their names there; defaults are those of its classes in transformers.

    Only Gemma 2, the `model_type` "gemma2", has a use for the last three.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    head_dim: int = 256
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    query_pre_attn_scalar: float = 256
    attn_logit_softcapping: float = 50.0
    sliding_window: int = 4096

    @property
    def is_gemma2(self) -> bool:
        """Whether scores are capped, every other layer is local, and norms follow attention and feed-forward too."""
        return self.model_type == "gemma2"


@dataclasses.dataclass(frozen=True)
class Config(FamilyConfig):
    """Everything that fixes the architecture."""

    title = TITLE
    text_config: TextConfig
    vision_config: VisionConfig

    @classmethod
    def from_huggingface(cls, config: dict) -> "Config":
        """From the content of a checkpoint's config.json.

        Raises:
          UserError: a field is missing, or asks for what PaliGemma checkpoints never had.
        """
        text, vision = fields.part(config, "text_config"), fields.part(config, "vision_config")
        rope = fields.rotary(text)
        text = {"model_type": "gemma"} | text | {"rope_theta": rope["rope_theta"]}
        chosen = cls.pick(text, vision)
        for name, value, known in (
            ("model_type of text", text["model_type"], ("gemma", "gemma2")),
            ("attention_bias", text.get("attention_bias") or False, (False,)),
            ("rope_type", rope["rope_type"], ("default",)),
            ("hidden_act of vision", vision.get("hidden_act", GELU), (GELU,)),
            ("num_channels", vision.get("num_channels", 3), (3,)),
            ("projection_dim", config.get("projection_dim", chosen.width), (chosen.width,)),
            *_fixed(text, chosen.text_config),
        ):
            fields.require(name, value, known, TITLE)
        chosen.check()
        return chosen

    def to_huggingface(self, vocabulary: int, token_ids: dict[str, int]) -> dict:
        """The content of config.json; the way back from `from_huggingface`.

        Args:
          vocabulary: rows of the embedding table, which may have grown.
          token_ids: of the special tokens.
        """
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

    def default_row(self, images: object) -> tuple[int, int]:
        """Two images with usual texts and their Meta Tokens, or one with the longest text, in tokens and patches.

        Of 448 pixels: (2432, 2048). The recipe's items fill 97 % of the tokens, and all patches; of rows of one image, 84 %.
        """
        patches = self.vision_config.patches
        tokens = max(2 * (patches + 192), patches + 640)
        return tokens + -tokens % 128, 2 * patches

    @property
    def layout(self) -> Layout:
        """The arrays of a batch: pixels; every image has as many patches, and each is a visual token."""
        vision = self.vision_config
        patches = {"patches": ArraySpec((3 * vision.patch_size**2,), "uint8")}
        return Layout(patches, position_axes=1, unit=1, multiple=vision.patches)

    def check(self) -> None:
        """Refuses sizes that do not fit each other.

        Raises:
          UserError: names the fields and their values.
        """
        text, vision = self.text_config, self.vision_config
        fields.check_depth(text.num_hidden_layers, vision.num_hidden_layers)
        fields.check_key_value_heads(text.num_attention_heads, text.num_key_value_heads)
        if text.head_dim % 2:
            raise UserError(f"text_config: head_dim {text.head_dim} is odd, and rotary angles come in pairs")
        fields.check_heads("vision_config", vision.hidden_size, vision.num_attention_heads)
        if vision.image_size % vision.patch_size:
            raise UserError(f"vision_config: an image_size of {vision.image_size} is no multiple of patch_size {vision.patch_size}")


def _fixed(text: dict, chosen: TextConfig) -> list[tuple[str, object, tuple]]:
    """(name, value, known values) of what one version of Gemma has."""
    if not chosen.is_gemma2:
        return [("hidden_act of text", text.get("hidden_act", GELU), (GELU, "gelu"))]  # which here means the same
    alternating = layer_types(chosen.num_hidden_layers)
    return [
        ("hidden_activation", text.get("hidden_activation", GELU), (GELU,)),
        ("layer_types", text.get("layer_types") or alternating, (alternating,)),
        *(
            (key, text.get(key, getattr(chosen, key)), (getattr(chosen, key),))
            for key in ("attn_logit_softcapping", "sliding_window")
        ),
    ]


def layer_types(layers: int) -> list[str]:
    """Gemma 2's kinds of layers, which alternate from a local one."""
    return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
