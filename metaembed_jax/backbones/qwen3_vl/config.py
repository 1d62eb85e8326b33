"""The architecture of Qwen3-VL (arXiv 2511.21631), dense, from a checkpoint's config.json and back."""

import dataclasses
import math

from metaembed_jax.backbones.config import HALF
from metaembed_jax.backbones.fields import part, require, rotary
from metaembed_jax.backbones.qwen.config import QwenConfig, token_fields
from metaembed_jax.batch.items import ArraySpec, Layout
from metaembed_jax.errors import UserError

TITLE = "Qwen3-VL"


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The fields of Hugging Face's `vision_config`, under their names there, and what preprocessor_config.json says of pixels."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    deepstack_visual_indexes: tuple[int, ...]
    num_position_embeddings: int = 2304
    patch_size: int = 16
    spatial_merge_size: int = 2
    image_mean: tuple[float, float, float] = HALF
    image_std: tuple[float, float, float] = HALF

    @property
    def table_side(self) -> int:
        """Rows, and columns, of the table of positions."""
        return math.isqrt(self.num_position_embeddings)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The fields of Hugging Face's `text_config`, under their names there; defaults are those of its class in transformers."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    mrope_section: tuple[int, int, int]
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5e5


@dataclasses.dataclass(frozen=True)
class Config(QwenConfig):
    """Everything that fixes the architecture."""

    title = TITLE
    text_config: TextConfig
    vision_config: VisionConfig

    @classmethod
    def from_huggingface(cls, config: dict) -> "Config":
        """From the content of a checkpoint's config.json, as released, or as transformers 5 writes it.

        Raises:
          UserError: a field is missing, or asks for what Qwen3-VL checkpoints never had.
        """
        text, vision = dict(part(config, "text_config")), part(config, "vision_config")
        rope = rotary(text)
        text |= {"rope_theta": rope["rope_theta"], "mrope_section": rope.get("mrope_section", text.get("mrope_section"))}
        vision_rope = part(vision, "rope_parameters")
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
        chosen = cls.pick(text, vision)
        chosen.check()
        return chosen

    def to_huggingface(self, vocabulary: int, token_ids: dict[str, int]) -> dict:
        """The content of config.json; the way back from `from_huggingface`.

        Args:
          vocabulary: rows of the embedding table, which may have grown.
          token_ids: of the special tokens.
        """
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
        """The arrays of a batch; `inputs` says what they hold."""
        vision = self.vision_config
        unit = vision.spatial_merge_size**2
        patches = {
            "patches": ArraySpec((3 * vision.patch_size**2,), "uint8"),
            "patch_positions": ArraySpec((2,), "int32"),
            "patch_grid": ArraySpec((2,), "int32", fill=1),
        }
        return Layout(patches, position_axes=3, unit=unit, multiple=unit)

    def check(self) -> None:
        """Refuses sizes that do not fit each other.

        Raises:
          UserError: names the fields and their values.
        """
        super().check()
        vision = self.vision_config
        if vision.table_side**2 != vision.num_position_embeddings:
            raise UserError(f"vision_config: num_position_embeddings {vision.num_position_embeddings} is no square number")
        taken = vision.deepstack_visual_indexes
        if not taken or list(taken) != sorted(set(taken)) or taken[-1] >= vision.depth:
            wanted = f"ascending numbers of its {vision.depth} layers, at least one"
            raise UserError(f"vision_config: deepstack_visual_indexes {taken} must be {wanted}")
