"""MetaEmbed-3B: the recipe of `configs/7b.py` on Qwen2.5-VL-3B, with its variants."""

from metaembed_jax.config import load_config


def get_config(arg=None):
    """`lora` (the default) or `full`."""
    config = load_config(f"7b:{arg or 'lora'}", {})
    config.name = config.name.replace("7b", "3b")
    config.init_from = "Qwen/Qwen2.5-VL-3B-Instruct"
    text, vision = config.architecture.text_config, config.architecture.vision_config
    text.hidden_size = vision.out_hidden_size = 2048
    text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = 36, 16, 2
    text.intermediate_size, text.vocab_size = 11008, 151936
    config.microbatch_rows, config.recompute, config.mesh.fsdp = 8, "everything", 1
    return config
