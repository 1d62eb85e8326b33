"""The architecture of Llama-3.2-Vision (arXiv 2407.21783; `mllama` in transformers); read from and written to config.json."""

import dataclasses
from typing import Any, Self

from metaembed_jax.backbones import config_checks
from metaembed_jax.backbones.config import CLIP_MEAN, CLIP_STD, FamilyConfig, FamilyTextConfig, FamilyVisionConfig
from metaembed_jax.batch.items import ArraySpec, Layout
from metaembed_jax.errors import UserError

TITLE = "Llama-3.2-Vision"
BEGIN, END, IMAGE = "<|begin_of_text|>", "<|end_of_text|>", "<|image|>"
EXTRA_ROWS = 8  # rows of the embedding table beyond vocab_size; the first belongs to the image token
MOST_TILES = 64  # of an image
# Tokens and images of a packed row. A text of 512 tokens with 80 Meta Tokens needs about 600. Two photos (documents) and their
# queries need 270, and the tower takes as long for one photo as the language model for the whole row.
DEFAULT_ROW = (640, 2)
ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(FamilyVisionConfig):
    """Fields of Hugging Face's `vision_config`, with the same names; defaults are those of its class in transformers."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_global_layers: int = 8
    attention_heads: int = 16
    vision_output_dim: int = 7680
    image_size: int = 448
    intermediate_layers_indices: tuple[int, ...] = (3, 7, 15, 23, 30)
    max_num_tiles: int = 4
    patch_size: int = 14
    norm_eps: float = 1e-5
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    @property
    def tile_patches(self) -> int:
        """Patches of a tile."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def image_patches(self) -> int:
        """Patches of an image: always those of `max_num_tiles` tiles, since the tower computes all of them."""
        return self.max_num_tiles * self.tile_patches

    @property
    def arrangements(self) -> list[tuple[int, int]]:
        """(rows, columns) of tiles that an image may have. The aspect-ratio id of an arrangement is its index, from 1."""
        sides = range(1, self.max_num_tiles + 1)
        return [(rows, columns) for rows in sides for columns in sides if rows * columns <= self.max_num_tiles]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(FamilyTextConfig):
    """Fields of Hugging Face's `text_config`, with the same names; defaults are those of its class in transformers.

    The last four are fields of `rope_scaling` of type "llama3"; their defaults scale nothing.
    """

    vocab_size: int = 128256
    hidden_size: int = 4096
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    intermediate_size: int = 14336
    cross_attention_layers: tuple[int, ...] = (3, 8, 13, 18, 23, 28, 33, 38)
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


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
          UserError: a field has a value that no Llama-3.2-Vision checkpoint has.
        """
        text, vision = config_checks.section(config, "text_config"), config_checks.section(config, "vision_config")
        rope = config_checks.rotary(text)
        kind = rope["rope_type"]
        if kind == "llama3" and (missing := [key for key in ROPE if rope.get(key) is None]):
            raise UserError(f"text_config of a {TITLE} config: rope_scaling lacks {', '.join(missing)}")
        text = config_checks.without_null(text | {"rope_theta": rope["rope_theta"]}, "rope_theta")
        text |= {key: rope[key] for key in ROPE if kind == "llama3"}
        architecture = cls.pick(text, vision)
        architecture.check()
        ratios = [list(arrangement) for arrangement in architecture.vision_config.arrangements]
        for name, value, known in (
            ("rope_type", kind, ("llama3", "default")),
            ("hidden_act of text", text.get("hidden_act", "silu"), ("silu",)),
            ("hidden_act of vision", vision.get("hidden_act", "gelu"), ("gelu",)),
            ("num_channels", vision.get("num_channels", 3), (3,)),
            ("supported_aspect_ratios", vision.get("supported_aspect_ratios") or ratios, (ratios,)),
        ):
            config_checks.require(name, value, known, TITLE)
        return architecture

    def to_huggingface(self, vocabulary: int, token_ids: dict[str, int]) -> dict:
        """Return the content of config.json; inverse of `from_huggingface`."""
        text = dataclasses.asdict(self.text_config) | {"vocab_size": vocabulary - EXTRA_ROWS, "model_type": "mllama_text_model"}
        rope = {key: text.pop(key) for key in (*ROPE, "rope_theta")} | {"rope_type": "llama3"}
        end = token_ids[END]
        vision = self.stored_vision() | {"model_type": "mllama_vision_model"}
        return {
            "model_type": "mllama",
            "architectures": ["MllamaModel"],
            "text_config": text
            | {"rope_parameters": rope, "bos_token_id": token_ids[BEGIN], "eos_token_id": end, "pad_token_id": end},
            "vision_config": vision | {"supported_aspect_ratios": self.vision_config.arrangements},
            "image_token_index": token_ids[IMAGE],
        }

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding table."""
        return self.text_config.vocab_size + EXTRA_ROWS

    def default_row(self, images: Any) -> tuple[int, int]:
        """Return `DEFAULT_ROW` in tokens and patches."""
        tokens, count = DEFAULT_ROW
        return tokens, count * self.vision_config.image_patches

    @property
    def layout(self) -> Layout:
        """The arrays of a batch: the pixels of each tile, and the id of the image's arrangement of tiles (0 in padding).

        The sequence has no visual tokens, so `unit` has no meaning.
        """
        vision = self.vision_config
        patches = {"patches": ArraySpec((3 * vision.patch_size**2,), "uint8"), "aspect_ratio": ArraySpec((), "int32")}
        return Layout(patches, position_axes=1, unit=1, multiple=vision.image_patches)

    def check(self) -> None:
        """Check that sizes fit each other."""
        text, vision = self.text_config, self.vision_config
        config_checks.check_depth(text.num_hidden_layers, vision.num_hidden_layers, vision.num_global_layers)
        config_checks.check_ascending("cross_attention_layers", text.cross_attention_layers, text.num_hidden_layers)
        config_checks.check_ascending("intermediate_layers_indices", vision.intermediate_layers_indices, vision.num_hidden_layers)
        config_checks.check_heads("text_config", text.hidden_size, text.num_attention_heads, multiple=2)
        config_checks.check_key_value_heads(text.num_attention_heads, text.num_key_value_heads)
        if text.high_freq_factor <= text.low_freq_factor:
            factor, low = text.high_freq_factor, text.low_freq_factor
            raise UserError(f"text_config: high_freq_factor is {factor}; expected more than low_freq_factor, {low}")
        config_checks.check_heads("vision_config", vision.hidden_size, vision.attention_heads)
        if vision.image_size % vision.patch_size:
            raise UserError(
                f"vision_config: image_size is {vision.image_size}; expected a multiple of patch_size, {vision.patch_size}"
            )
        if vision.max_num_tiles > MOST_TILES:
            raise UserError(f"vision_config: max_num_tiles is {vision.max_num_tiles}; expected at most {MOST_TILES}")
        if vision.vision_output_dim != (states := vision.hidden_size * (1 + len(vision.intermediate_layers_indices))):
            raise UserError(
                f"vision_config: vision_output_dim is {vision.vision_output_dim}; expected the width of its states, {states}"
            )
