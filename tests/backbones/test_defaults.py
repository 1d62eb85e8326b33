"""A config.json need not have what equals transformers' defaults: each key, each section, and all of them."""

import copy
import dataclasses

import pytest

from metaembed_jax.backbones.family import family

transformers = pytest.importorskip("transformers")

# What makes the sizes of transformers' default config fit each other.
CASES = {
    "qwen2_5_vl": ("Qwen2_5_VLConfig", {"vision_config": {"out_hidden_size": 8192}}),
    "qwen3_vl": ("Qwen3VLConfig", {"vision_config": {"out_hidden_size": 4096}}),
    "paligemma": ("PaliGemmaConfig", {"vision_config": {"patch_size": 14, "hidden_size": 1152, "num_attention_heads": 16}}),
    "paligemma: gemma2": (
        "PaliGemmaConfig",
        {"text_config": {"model_type": "gemma2"}, "vision_config": {"patch_size": 14}, "projection_dim": 2304},
    ),
    "paligemma: gemma": ("PaliGemmaConfig", {"text_config": {"model_type": "gemma", "head_dim": 64}, "projection_dim": 3072}),
    "mllama": ("MllamaConfig", {}),
    "idefics3": ("Idefics3Config", {"vision_config": {"image_size": 256}}),
    "idefics3: few heads": (
        "Idefics3Config",
        {"vision_config": {"image_size": 256}, "text_config": {"num_attention_heads": 16, "num_hidden_layers": 3}},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_equals_a_default_may_be_absent(case):
    name, given = CASES[case]
    Config = family(case.partition(":")[0]).Config
    stored = {"model_type": case.partition(":")[0], **given}

    def of_transformers(config):
        read = getattr(transformers, name)(**copy.deepcopy({key: value for key, value in config.items() if key != "model_type"}))
        return read.to_dict() if case.partition(":")[0] != "idefics3" else read.to_diff_dict()

    full = of_transformers(stored)
    expected = Config.from_huggingface(full)
    assert Config.from_huggingface(stored) == expected
    sections = {field.name: field.type for field in dataclasses.fields(Config)}
    removed = 0
    for section, kind in sections.items():
        for field in dataclasses.fields(kind):
            part = {key: value for key, value in full[section].items() if key != field.name}
            config = {**full, section: part}
            if field.name in full[section] and of_transformers(config)[section].get(field.name) == full[section][field.name]:
                removed += 1
                assert Config.from_huggingface(config) == expected, field.name
    assert removed > 6
