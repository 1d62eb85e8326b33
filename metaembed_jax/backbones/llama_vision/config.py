"""The architecture of Llama-3.2-Vision (arXiv 2407.21783; transformers' `mllama`), from a checkpoint's config.json and back."""

import dataclasses

from metaembed_jax.backbones import fields
from metaembed_jax.backbones.config import CLIP_MEAN, CLIP_STD, FamilyConfig
from metaembed_jax.batch.items import ArraySpec, Layout
from metaembed_jax.errors import UserError

TITLE = "Llama-3.2-Vision"
BEGIN, END, IMAGE = "<|begin_of_text|>", "<|end_of_text|>", "<|image|>"
MORE_ROWS = 8  # that the embedding table has beyond vocab_size; the first is the image token's
MOST_TILES = 64  # of an image that a config may ask for
# Tokens and images of a packed row. A text of 512 tokens with 80 Meta Tokens needs about 600; two photos, as documents, and their
# queries need 270, and the tower as long for one of them as the language model for the whole row.
DEFAULT_ROW = (640, 2)
ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The fields of Hugging Face's `vision_config`, under their names there; defaults are those of its class in transformers."""

    hidden_size: int
    num_hidden_layers: int
    num_global_layers: int
    attention_heads: int
    intermediate_size: int
    vision_output_dim: int
    image_size: int
    intermediate_layers_indices: tuple[int, ...]
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
        """Patches of an image: of all tiles that one may have, because the tower computes them all."""
        return self.max_num_tiles * self.tile_patches

    @property
    def arrangements(self) -> list[tuple[int, int]]:
        """(rows, columns) of tiles that an image may have; the aspect-ratio id of one is its place, counted from 1."""
        sides = range(1, self.max_num_tiles + 1)
        return [(rows, columns) for rows in sides for columns in sides if rows * columns <= self.max_num_tiles]


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The fields of Hugging Face's `text_config`, under their names there; defaults are those of its class in transformers.

    The last four are those of `rope_scaling`, of the type "llama3"; with their defaults nothing is scaled.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    cross_attention_layers: tuple[int, ...]
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


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
          UserError: a field is missing, or asks for what Llama-3.2-Vision checkpoints never had.
        """
        text, vision = fields.part(config, "text_config"), fields.part(config, "vision_config")
        rope = fields.rotary(text)
        kind = rope["rope_type"]
        if kind == "llama3" and (missing := [key for key in ROPE if rope.get(key) is None]):
            raise UserError(f"text_config of a {TITLE} config: rope_scaling lacks {', '.join(missing)}")
        text = text | {"rope_theta": rope["rope_theta"]}
        text |= {key: rope[key] for key in ROPE if kind == "llama3"}
        chosen = cls.pick(text, vision)
        chosen.check()
        ratios = [list(arrangement) for arrangement in chosen.vision_config.arrangements]
        for name, value, known in (
            ("rope_type", kind, ("llama3", "default")),
            ("hidden_act of text", text.get("hidden_act", "silu"), ("silu",)),
            ("hidden_act of vision", vision.get("hidden_act", "gelu"), ("gelu",)),
            ("num_channels", vision.get("num_channels", 3), (3,)),
            ("supported_aspect_ratios", vision.get("supported_aspect_ratios") or ratios, (ratios,)),
        ):
            fields.require(name, value, known, TITLE)
        return chosen

    def to_huggingface(self, vocabulary: int, token_ids: dict[str, int]) -> dict:
        """The content of config.json; the way back from `from_huggingface`.

        Args:
          vocabulary: rows of the embedding table, which may have grown.
          token_ids: of the special tokens.
        """
        text = dataclasses.asdict(self.text_config) | {"vocab_size": vocabulary - MORE_ROWS, "model_type": "mllama_text_model"}
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
        return self.text_config.vocab_size + MORE_ROWS

    def default_row(self, images: object) -> tuple[int, int]:
        """Tokens and patches of a packed row."""
        tokens, images = DEFAULT_ROW
        return tokens, images * self.vision_config.image_patches

    @property
    def layout(self) -> Layout:
        """The arrays of a batch: pixels, tile after tile, and the id of the image's arrangement of tiles, 0 in padding.

        No visual token stands in the sequence, so `unit` has no meaning.
        """
        vision = self.vision_config
        patches = {"patches": ArraySpec((3 * vision.patch_size**2,), "uint8"), "aspect_ratio": ArraySpec((), "int32")}
        return Layout(patches, position_axes=1, unit=1, multiple=vision.image_patches)

    def check(self) -> None:
        """Refuses sizes that do not fit each other.

        Raises:
          UserError: names the fields and their values.
        """
        text, vision = self.text_config, self.vision_config
        fields.check_depth(text.num_hidden_layers, vision.num_hidden_layers, vision.num_global_layers)
        for name, depth, layers in (
            ("cross_attention_layers", text.num_hidden_layers, text.cross_attention_layers),
            ("intermediate_layers_indices", vision.num_hidden_layers, vision.intermediate_layers_indices),
        ):
            if not layers or list(layers) != sorted(set(layers)) or layers[-1] >= depth:
                raise UserError(f"config.json: {name} {list(layers)} must be some of {depth} layers, counted from 0, in order")
        fields.check_heads("text_config", text.hidden_size, text.num_attention_heads, multiple=2)
        fields.check_key_value_heads(text.num_attention_heads, text.num_key_value_heads)
        if text.high_freq_factor <= text.low_freq_factor:
            factors = f"high_freq_factor {text.high_freq_factor} must be above low_freq_factor {text.low_freq_factor}"
            raise UserError(f"text_config: {factors}")
        fields.check_heads("vision_config", vision.hidden_size, vision.attention_heads)
        if vision.image_size % vision.patch_size:
            raise UserError(f"vision_config: an image_size of {vision.image_size} is no multiple of patch_size {vision.patch_size}")
        if vision.max_num_tiles > MOST_TILES:
            raise UserError(f"vision_config: max_num_tiles is {vision.max_num_tiles}; at most {MOST_TILES} are read")
        if vision.vision_output_dim != (states := vision.hidden_size * (1 + len(vision.intermediate_layers_indices))):
            sizes = f"{vision.vision_output_dim} is not the width of the states it is to hold, {states}"
            raise UserError(f"vision_config: vision_output_dim {sizes}")
