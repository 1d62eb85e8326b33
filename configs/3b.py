"""MetaEmbed-3B: the recipe of `configs/7b.py` on Qwen2.5-VL-3B, with its variants."""

from metaembed_jax.config import load_config, with_keys


def get_config(arg=None):
    """`lora` (the default) or `full`."""
    base = load_config(f"7b:{arg or 'lora'}")
    return with_keys(
        base,
        {
            "name": base.name.replace("7b", "3b"),
            "init_from": "Qwen/Qwen2.5-VL-3B-Instruct",
            "model.architecture.text_config.vocab_size": 151936,
            "model.architecture.text_config.hidden_size": 2048,
            "model.architecture.text_config.num_hidden_layers": 36,
            "model.architecture.text_config.num_attention_heads": 16,
            "model.architecture.text_config.num_key_value_heads": 2,
            "model.architecture.text_config.intermediate_size": 11008,
            "model.architecture.vision_config.out_hidden_size": 2048,
            "rows.microbatch_rows": 8,
            "rows.recompute": "everything",
            "mesh.fsdp": 1,
        },
    )
