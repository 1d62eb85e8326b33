"""The architecture of Qwen2.5-VL (arXiv 2502.13923), from a checkpoint's config.json and back."""

import dataclasses
from pathlib import Path

from metaembed_jax.backbones.fields import check_depth, check_sizes, free, normalisation, part, pick, require
from metaembed_jax.errors import UserError
from metaembed_jax.inputs.examples import ArraySpec, Layout

TITLE = "Qwen2.5-VL"
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The fields of Hugging Face's `vision_config`, under their names there."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    fullatt_block_indexes: tuple[int, ...]
    patch_size: int = 14
    spatial_merge_size: int = 2
    window_size: int = free(112)  # boards have larger pages than the icons that a run starts from
    image_mean: tuple[float, float, float] = IMAGE_MEAN
    image_std: tuple[float, float, float] = IMAGE_STD

    @property
    def window_patches(self) -> int:
        """Patches in a full attention window."""
        return (self.window_size // self.patch_size // self.spatial_merge_size * self.spatial_merge_size) ** 2


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
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that fixes the architecture."""

    text_config: TextConfig
    vision_config: VisionConfig

    @property
    def width(self) -> int:
        """Of the states of the language model."""
        return self.text_config.hidden_size

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding table."""
        return self.text_config.vocab_size

    @property
    def layout(self) -> Layout:
        """The arrays of a batch; see `inputs` for what they hold."""
        return Layout(
            tokens={"positions": ArraySpec((3,), "int32"), "visual_index": ArraySpec((), "int32", fill=-1)},
            patches={
                "patches": ArraySpec((3 * self.vision_config.patch_size**2,), "uint8"),
                "patch_positions": ArraySpec((2,), "int32"),
                "patch_mask": ArraySpec((), "bool"),
            },
        )

    @property
    def patch_multiple(self) -> int:
        """An image is whole windows."""
        return self.vision_config.window_patches

    @classmethod
    def from_huggingface(cls, config: dict) -> "Config":
        """From the content of a checkpoint's config.json, in either layout in circulation (flat, or with `text_config`).

        Raises:
          UserError: a field is missing, or asks for what Qwen2.5-VL checkpoints never had.
        """
        text = {**config, **part(config, "text_config")}
        rope = {**part(text, "rope_scaling"), **part(text, "rope_parameters")}
        text.setdefault("mrope_section", rope.get("mrope_section"))
        text.setdefault("rope_theta", rope.get("rope_theta", TextConfig.rope_theta))
        vision = part(config, "vision_config")
        fixed = (
            ("use_sliding_window", text.get("use_sliding_window") or False, (False,)),
            ("hidden_act of text", text.get("hidden_act", "silu"), ("silu",)),
            ("hidden_act of vision", vision.get("hidden_act", "silu"), ("silu",)),
            ("rope_type", rope.get("rope_type", rope.get("type", "default")), ("default", "mrope")),
            ("temporal_patch_size", vision.get("temporal_patch_size", 2), (2,)),
        )
        for name, value, known in fixed:
            require(name, value, known, TITLE)
        chosen = cls(pick(TextConfig, text, "text_config", TITLE), pick(VisionConfig, vision, "vision_config", TITLE))
        chosen.check()
        return chosen

    def with_preprocessor(self, preprocessor: dict, place: Path) -> "Config":
        """With the mean and standard deviation of pixels that a preprocessor_config.json has.

        Raises:
          UserError: they are none, or its patches are others than this model's; names `place`.
        """
        check_sizes({key: preprocessor.get(key) for key in ("patch_size", "merge_size")})
        vision = self.vision_config
        ours = (preprocessor.get("patch_size") or 14, preprocessor.get("merge_size") or 2)
        if ours != (theirs := (vision.patch_size, vision.spatial_merge_size)):
            raise UserError(f"{place}: patch and merge sizes are {ours} in preprocessor_config.json and {theirs} in config.json")
        vision = dataclasses.replace(vision, **normalisation(preprocessor, place, TITLE))
        return dataclasses.replace(self, vision_config=vision)

    def to_huggingface(self, vocabulary: int, token_ids: dict[str, int]) -> dict:
        """The content of config.json; the way back from `from_huggingface`.

        Args:
          vocabulary: rows of the embedding table, which may have grown.
          token_ids: of the special tokens.
        """
        text = dataclasses.asdict(self.text_config) | {"vocab_size": vocabulary, "model_type": "qwen2_5_vl_text"}
        sections, theta = text.pop("mrope_section"), text.pop("rope_theta")
        rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": list(sections)}
        vision = dataclasses.asdict(self.vision_config) | {"model_type": "qwen2_5_vl"}
        for key in ("image_mean", "image_std"):
            vision.pop(key)
        return {
            "model_type": "qwen2_5_vl",
            "architectures": ["Qwen2_5_VLModel"],
            "text_config": text | {"rope_parameters": rope},
            "vision_config": vision,
            "image_token_id": token_ids["<|image_pad|>"],
            "video_token_id": token_ids.get("<|video_pad|>", vocabulary),  # none: a number that no token has
            "vision_start_token_id": token_ids["<|vision_start|>"],
            "vision_end_token_id": token_ids["<|vision_end|>"],
        }

    def check(self) -> None:
        """Refuses sizes that do not fit each other.

        Raises:
          UserError: names the fields and their values.
        """
        text, vision = self.text_config, self.vision_config
        check_depth(text.num_hidden_layers, vision.depth)
        half_head, rest = divmod(text.hidden_size, 2 * text.num_attention_heads)
        if rest or text.num_attention_heads % text.num_key_value_heads:
            heads = f"{text.num_attention_heads} attention heads and {text.num_key_value_heads} key-value heads"
            raise UserError(f"text_config: a hidden_size of {text.hidden_size} cannot be split over {heads}")
        if len(text.mrope_section) != 3 or sum(text.mrope_section) != half_head:
            wanted = f"three numbers that add up to half a head's width, {half_head}"
            raise UserError(f"text_config: mrope_section {text.mrope_section} must be {wanted}")
        if vision.hidden_size % (4 * vision.num_heads):
            heads = f"{vision.num_heads} heads, each a multiple of 4 wide"
            raise UserError(f"vision_config: a hidden_size of {vision.hidden_size} cannot be split over {heads}")
        if vision.out_hidden_size != text.hidden_size:
            raise UserError(
                f"vision_config: out_hidden_size {vision.out_hidden_size} is not the text's hidden_size, {text.hidden_size}"
            )
