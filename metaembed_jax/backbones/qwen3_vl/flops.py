"""The parts of Qwen3-VL, for counting its arithmetic. P patches, U units."""

from metaembed_jax.backbones.parts import Attention, Part
from metaembed_jax.backbones.qwen.flops import language
from metaembed_jax.backbones.qwen3_vl.config import Config, VisionConfig
from metaembed_jax.batch.packing import Size


def parts(config: Config, row: Size) -> tuple[Part, ...]:
    """See `backbones.parts`."""
    vision = _vision(config.vision_config, row.patches) if row.patches else ()
    return (*vision, *language(config.text_config, row.tokens, row.vectors))


def _vision(config: VisionConfig, P: int) -> tuple[Part, ...]:
    heads, U = (config.num_heads, config.num_heads, config.hidden_size // config.num_heads), P // config.spatial_merge_size**2
    return (
        Part("vision.patch_embedding", P),
        Part("vision.position_table", P),
        Part("vision.blocks", P, config.hidden_size, (Attention(config.depth, P, P, P, *heads),), last="mlp.down"),
        *(Part(f"vision.{merger}.{name}", U) for merger in ("merger", "deepstack") for name in ("norm", "up", "down")),
    )
