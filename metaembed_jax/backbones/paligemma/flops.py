"""The parts of PaliGemma, for counting its arithmetic. P patches, T tokens."""

from metaembed_jax.backbones.paligemma.config import Config, TextConfig, VisionConfig
from metaembed_jax.backbones.parts import Attention, Part
from metaembed_jax.batch.packing import Size


def parts(config: Config, row: Size) -> tuple[Part, ...]:
    """See `backbones.parts`."""
    return (*(_vision(config.vision_config, row.patches) if row.patches else ()), _language(config.text_config, row.tokens))


def _vision(config: VisionConfig, P: int) -> tuple[Part, ...]:
    heads = config.num_attention_heads
    attention = Attention(config.num_hidden_layers, P, P, config.patches, heads, heads, config.hidden_size // heads, rotates=False)
    return (
        Part("vision.patch_embedding", P),
        Part("vision.positions", P),
        Part("vision.blocks", P, config.hidden_size, (attention,), last="mlp.down"),
        Part("vision.final_norm", P),
        Part("vision.projector", P),
    )


def _language(config: TextConfig, T: int) -> Part:
    heads, layers = (config.num_attention_heads, config.num_key_value_heads, config.head_dim), config.num_hidden_layers
    attention = Attention(layers, T, T, 2 * T, *heads)  # of prompts and of Meta Tokens, each over all positions
    last = "" if config.is_gemma2 else "mlp.down"  # which a norm of Gemma 2 reads
    return Part("layers", T, config.hidden_size, (attention,), last=last, has_meta=True)
