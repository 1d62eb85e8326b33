"""The architecture of dense Qwen3-VL (arXiv 2511.21631); read from and written to a checkpoint's config.json."""

import dataclasses
import math
from typing import Self

from metaembed_jax.backbones.config_checks import check_ascending, require, rotary, section, without_null
from metaembed_jax.backbones.qwen.config import QwenConfig, QwenTextConfig, QwenVisionConfig, token_fields, with_heads
from metaembed_jax.batch.items import ArraySpec, Layout
from metaembed_jax.errors import UserError

TITLE = "Qwen3-VL"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(QwenVisionConfig):
    """Fields of Hugging Face's `vision_config`, with the same names; defaults are those of its class in transformers."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    depth: int = 27
    num_heads: int = 16
    out_hidden_size: int = 3584
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)
    num_position_embeddings: int = 2304
    patch_size: int = 16

    @property
    def table_side(self) -> int:
        """Number of rows, and of columns, in the table of positions."""
        return math.isqrt(self.num_position_embeddings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(QwenTextConfig):
    """Fields of Hugging Face's `text_config`, with the same names; defaults are those of its class in transformers."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    intermediate_size: int = 22016
    mrope_section: tuple[int, int, int] = (24, 20, 20)
    head_dim: int = 128
    rope_theta: float = 5e5

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.head_dim


@dataclasses.dataclass(frozen=True)
class Config(QwenConfig):
    """The architecture: the fields of a config.json that define the network."""

    title = TITLE
    text_config: TextConfig
    vision_config: VisionConfig

    @classmethod
    def from_huggingface(cls, config: dict) -> Self:
        """Read the content of a checkpoint's config.json, in the released form or in that of transformers 5.

        Raises:
          UserError: a field has a value that no Qwen3-VL checkpoint has.
        """
        text, vision = dict(section(config, "text_config")), section(config, "vision_config")
        rope = rotary(text)
        text |= {"rope_theta": rope["rope_theta"], "mrope_section": rope.get("mrope_section", text.get("mrope_section"))}
        text = with_heads(without_null(text, "rope_theta", "mrope_section"))
        vision_rope = section(vision, "rope_parameters")
        fixed = (
            ("attention_bias of text", text.get("attention_bias") or False, False),
            ("hidden_act of text", text.get("hidden_act", "silu"), "silu"),
            ("rope_type of text", rope["rope_type"], "default"),
            ("mrope_interleaved", rope.get("mrope_interleaved", True), True),
            ("hidden_act of vision", vision.get("hidden_act", "gelu_pytorch_tanh"), "gelu_pytorch_tanh"),
            ("rope_theta of vision", vision_rope.get("rope_theta", 10000.0), 10000.0),
            ("rope_type of vision", vision_rope.get("rope_type", "axial"), "axial"),
            ("in_channels", vision.get("in_channels", 3), 3),
            ("temporal_patch_size", vision.get("temporal_patch_size", 2), 2),
        )
        for name, value, known in fixed:
            require(name, value, (known,), TITLE)
        architecture = cls.pick(text, vision)
        architecture.check()
        return architecture

    def to_huggingface(self, vocabulary: int, token_ids: dict[str, int]) -> dict:
        """Return the content of config.json; inverse of `from_huggingface`."""
        text = dataclasses.asdict(self.text_config) | {"vocab_size": vocabulary, "model_type": "qwen3_vl_text"}
        rope = {"rope_type": "default", "mrope_interleaved": True}
        rope |= {"rope_theta": text.pop("rope_theta"), "mrope_section": list(text.pop("mrope_section"))}
        vision = self.stored_vision() | {"model_type": "qwen3_vl_vision"}
        return {
            "model_type": "qwen3_vl",
            "architectures": ["Qwen3VLModel"],
            "text_config": text | {"rope_parameters": rope},
            "vision_config": vision,
            **token_fields(token_ids, vocabulary),
        }

    @property
    def layout(self) -> Layout:
        """The arrays of a batch; see `inputs`."""
        vision = self.vision_config
        unit = vision.spatial_merge_size**2
        patches = {
            "patches": ArraySpec((3 * vision.patch_size**2,), "uint8"),
            "patch_positions": ArraySpec((2,), "int32"),
            "patch_grid": ArraySpec((2,), "int32", fill=1),
        }
        return Layout(patches, position_axes=3, unit=unit, multiple=unit)

    def check(self) -> None:
        """Check that sizes fit each other."""
        super().check()
        vision = self.vision_config
        if vision.table_side**2 != vision.num_position_embeddings:
            raise UserError(f"vision_config: num_position_embeddings is {vision.num_position_embeddings}; expected a square number")
        check_ascending("deepstack_visual_indexes", vision.deepstack_visual_indexes, vision.depth)
