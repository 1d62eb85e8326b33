"""The parts of the Qwen-VL families' language models, for counting their arithmetic. S tokens, V vectors."""

from metaembed_jax.backbones.layers import cuts_last
from metaembed_jax.backbones.parts import Attention, Part


def language(config: object, S: int, V: int) -> tuple[Part, ...]:
    """Of a `text_config`; see `backbones.parts`."""
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    cut = int(cuts_last(config.num_hidden_layers))
    attention = (Attention(config.num_hidden_layers - cut, S, S, S, *heads),)
    last = Part(
        "layers",
        V,
        config.hidden_size,
        (Attention(1, V, S, S, *heads),),
        other_positions={"key": S, "value": S},
        scanned=False,
        has_meta=True,
    )
    return (Part("layers", S, config.hidden_size, attention, last="mlp.down", has_meta=True), *([last] if cut else []))
