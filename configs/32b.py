"""MetaEmbed-32B: the recipe of `configs/7b.py` on Qwen2.5-VL-32B, with its variants."""

from metaembed_jax.config import load_config


def get_config(arg=None):
    """`lora` (the default) or `full`."""
    config = load_config(f"7b:{arg or 'lora'}", {})
    config.name = config.name.replace("7b", "32b")
    config.init_from = "Qwen/Qwen2.5-VL-32B-Instruct"
    text, vision = config.architecture.text_config, config.architecture.vision_config
    text.hidden_size = vision.out_hidden_size = 5120
    text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = 64, 40, 8
    text.intermediate_size, vision.intermediate_size = 27648, 3456
    return config
