"""The architecture of Qwen2.5-VL (arXiv 2502.13923); read from and written to a checkpoint's config.json."""

import dataclasses
from typing import Self

from metaembed_jax.backbones.config import CLIP_MEAN, CLIP_STD
from metaembed_jax.backbones.config_checks import check_heads, free, require, rotary, section, without_null
from metaembed_jax.backbones.qwen.config import QwenConfig, QwenTextConfig, QwenVisionConfig, token_fields, with_heads
from metaembed_jax.batch.items import ArraySpec, Layout

TITLE = "Qwen2.5-VL"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(QwenVisionConfig):
    """Fields of Hugging Face's `vision_config`, with the same names; defaults are those of its class in transformers."""

    hidden_size: int = 3584
    intermediate_size: int = 3420
    depth: int = 32
    num_heads: int = 16
    out_hidden_size: int = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    patch_size: int = 14
    window_size: int = free(112)  # configs/boards.py has larger pages than the icons of the run it starts from
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    @property
    def window_patches(self) -> int:
        """Patches of a full window."""
        return (self.window_size // self.patch_size // self.spatial_merge_size * self.spatial_merge_size) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(QwenTextConfig):
    """Fields of Hugging Face's `text_config`, with the same names; defaults are those of its class in transformers."""

    vocab_size: int = 152064
    hidden_size: int = 8192
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    intermediate_size: int = 29568
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6


@dataclasses.dataclass(frozen=True)
class Config(QwenConfig):
    """The architecture: the fields of a config.json that define the network."""

    title = TITLE
    text_config: TextConfig
    vision_config: VisionConfig

    @classmethod
    def from_huggingface(cls, config: dict) -> Self:
        """Read the content of a checkpoint's config.json, flat or with `text_config`.

        Raises:
          UserError: a field has a value that no Qwen2.5-VL checkpoint has.
        """
        text = {**config, **section(config, "text_config")}
        rope = rotary(text)
        text |= {"rope_theta": rope["rope_theta"], "mrope_section": rope.get("mrope_section", text.get("mrope_section"))}
        text = with_heads(without_null(text, "rope_theta", "mrope_section"))
        vision = section(config, "vision_config")
        fixed = (
            ("use_sliding_window", text.get("use_sliding_window") or False, (False,)),
            ("hidden_act of text", text.get("hidden_act", "silu"), ("silu",)),
            ("hidden_act of vision", vision.get("hidden_act", "silu"), ("silu",)),
            ("rope_type", rope["rope_type"], ("default", "mrope")),
            ("temporal_patch_size", vision.get("temporal_patch_size", 2), (2,)),
        )
        for name, value, known in fixed:
            require(name, value, known, TITLE)
        architecture = cls.pick(text, vision)
        architecture.check()
        return architecture

    def to_huggingface(self, vocabulary: int, token_ids: dict[str, int]) -> dict:
        """Return the content of config.json; inverse of `from_huggingface`."""
        text = dataclasses.asdict(self.text_config) | {"vocab_size": vocabulary, "model_type": "qwen2_5_vl_text"}
        sections, theta = text.pop("mrope_section"), text.pop("rope_theta")
        rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": list(sections)}
        vision = self.stored_vision() | {"model_type": "qwen2_5_vl"}
        return {
            "model_type": "qwen2_5_vl",
            "architectures": ["Qwen2_5_VLModel"],
            "text_config": text | {"rope_parameters": rope},
            "vision_config": vision,
            **token_fields(token_ids, vocabulary),
        }

    @property
    def layout(self) -> Layout:
        """The arrays of a batch; see `inputs`."""
        vision = self.vision_config
        patches = {
            "patches": ArraySpec((3 * vision.patch_size**2,), "uint8"),
            "patch_positions": ArraySpec((2,), "int32"),
            "windows": ArraySpec((), "int32", fill=-1),
        }
        return Layout(patches, position_axes=3, unit=vision.spatial_merge_size**2, multiple=vision.window_patches)

    def check(self) -> None:
        """Check that sizes fit each other."""
        text = self.text_config
        check_heads("text_config", text.hidden_size, text.num_attention_heads)
        super().check()
