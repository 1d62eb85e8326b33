"""MetaEmbed-32B: the recipe of `configs/7b.py` on Qwen2.5-VL-32B, with its variants."""

from metaembed_jax.config import load_config, with_keys


def get_config(arg=None):
    """`lora` (the default) or `full`."""
    base = load_config(f"7b:{arg or 'lora'}")
    return with_keys(
        base,
        {
            "name": base.name.replace("7b", "32b"),
            "init_from": "Qwen/Qwen2.5-VL-32B-Instruct",
            "model.architecture.text_config.hidden_size": 5120,
            "model.architecture.text_config.num_hidden_layers": 64,
            "model.architecture.text_config.num_attention_heads": 40,
            "model.architecture.text_config.num_key_value_heads": 8,
            "model.architecture.text_config.intermediate_size": 27648,
            "model.architecture.vision_config.out_hidden_size": 5120,
            "model.architecture.vision_config.intermediate_size": 3456,
        },
    )
