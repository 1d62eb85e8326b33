"""The parts of Qwen3-VL, for counting its arithmetic. P patches, U units, S rows of text, R of them read."""

from metaembed_jax.backbones.parts import Attention, Part
from metaembed_jax.backbones.qwen.flops import language
from metaembed_jax.backbones.qwen3_vl.config import Config, VisionConfig


def parts(config: Config, patches: int, rows: int, read: int) -> tuple[Part, ...]:
    """See `backbones.parts`."""
    return (*(_vision(config.vision_config, patches) if patches else ()), *language(config.text_config, rows, read))


def _vision(config: VisionConfig, P: int) -> tuple[Part, ...]:
    heads, U = (config.num_heads, config.num_heads, config.hidden_size // config.num_heads), P // config.spatial_merge_size**2
    return (
        Part("vision.patch_embedding", P),
        Part("vision.position_table", P),
        Part("vision.blocks", P, config.hidden_size, (Attention(config.depth, P, P, P, *heads),), last="mlp.down"),
        *(Part(f"vision.{merger}.{name}", U) for merger in ("merger", "deepstack") for name in ("norm", "up", "down")),
    )
