"""A small Qwen2.5-VL directory written with NumPy alone; the names and shapes of its tensors are those of the published ones."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.backbones.qwen2_5_vl.reference import configuration, write_tokenizer

SMALL = configuration(heads=(4, 2), sections=(1, 2, 1), width=32, layers=2, depth=3, full=(1,), tied=False)


def shapes(configuration: dict = SMALL) -> dict[str, tuple[int, ...]]:
    text, vision = configuration["text_config"], configuration["vision_config"]
    D, F, V = text["hidden_size"], text["intermediate_size"], vision["hidden_size"]
    G = D // text["num_attention_heads"] * text["num_key_value_heads"]
    table = {
        "model.embed_tokens.weight": (text["vocab_size"], D),
        "model.norm.weight": (D,),
        "lm_head.weight": (text["vocab_size"], D),
    }
    for layer in range(text["num_hidden_layers"]):
        for name, shape in (
            ("input_layernorm.weight", (D,)),
            ("post_attention_layernorm.weight", (D,)),
            ("self_attn.q_proj.weight", (D, D)),
            ("self_attn.q_proj.bias", (D,)),
            ("self_attn.k_proj.weight", (G, D)),
            ("self_attn.k_proj.bias", (G,)),
            ("self_attn.v_proj.weight", (G, D)),
            ("self_attn.v_proj.bias", (G,)),
            ("self_attn.o_proj.weight", (D, D)),
            ("mlp.gate_proj.weight", (F, D)),
            ("mlp.up_proj.weight", (F, D)),
            ("mlp.down_proj.weight", (D, F)),
        ):
            table[f"model.layers.{layer}.{name}"] = shape
    I = vision["intermediate_size"]  # noqa: E741
    for block in range(vision["depth"]):
        for name, shape in (
            ("norm1.weight", (V,)),
            ("norm2.weight", (V,)),
            ("attn.qkv.weight", (3 * V, V)),
            ("attn.qkv.bias", (3 * V,)),
            ("attn.proj.weight", (V, V)),
            ("attn.proj.bias", (V,)),
            ("mlp.gate_proj.weight", (I, V)),
            ("mlp.gate_proj.bias", (I,)),
            ("mlp.up_proj.weight", (I, V)),
            ("mlp.up_proj.bias", (I,)),
            ("mlp.down_proj.weight", (V, I)),
            ("mlp.down_proj.bias", (V,)),
        ):
            table[f"visual.blocks.{block}.{name}"] = shape
    return table | {
        "visual.patch_embed.proj.weight": (V, 3, 2, 14, 14),
        "visual.merger.ln_q.weight": (V,),
        "visual.merger.mlp.0.weight": (4 * V, 4 * V),
        "visual.merger.mlp.0.bias": (4 * V,),
        "visual.merger.mlp.2.weight": (D, 4 * V),
        "visual.merger.mlp.2.bias": (D,),
    }


def random_tensors(dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {key: (0.1 * rng.normal(size=shape)).astype(dtype) for key, shape in shapes().items()}


def new_layout(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names that transformers uses since 4.52."""

    def rename(key):
        return "model." + key if key.startswith("visual.") else key.replace("model.", "model.language_model.", 1)

    return {rename(key): tensor for key, tensor in tensors.items()}


def write(directory: Path, *files: dict[str, np.ndarray], index: dict[str, str] | None = None) -> Path:
    """The directory, with its tensors in one file, or in several that an index names."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", **SMALL}))
    (directory / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 4 * 784, "max_pixels": 16 * 784}))
    write_tokenizer(directory)
    if len(files) == 1 and index is None:
        save_file(files[0], directory / "model.safetensors")
        return directory
    names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    for name, tensors in zip(names, files, strict=True):
        save_file(tensors, directory / name)
    if index is None:
        index = {key: name for name, tensors in zip(names, files, strict=True) for key in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return directory
