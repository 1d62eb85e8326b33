"""config.json of Qwen3-VL, in and out, and what is refused of it."""

import copy
from pathlib import Path

import pytest

from metaembed_jax.backbones.qwen3_vl.config import Config
from metaembed_jax.errors import UserError
from tests.backbones.qwen3_vl.reference import CONFIGURATIONS

# As the 2B model is released.
RELEASED = {
    "model_type": "qwen3_vl",
    "tie_word_embeddings": True,
    "text_config": {
        "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000, "tie_word_embeddings": True, "vocab_size": 151936,
    },
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1024,
        "in_channels": 3, "intermediate_size": 4096, "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": 2048,
        "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
    },
}  # fmt: skip
IDS = {"<|image_pad|>": 1, "<|vision_start|>": 2, "<|vision_end|>": 3}


def changed(part, key, value):
    config = copy.deepcopy(RELEASED)
    config[part][key] = value
    return config


def test_the_released_layout():
    config = Config.from_huggingface(RELEASED)
    assert (config.text_config.rope_theta, config.text_config.mrope_section) == (5e6, (24, 20, 20))
    assert (config.vision_config.table_side, config.width, config.vocabulary, config.layout.multiple) == (48, 2048, 151936, 4)


@pytest.mark.parametrize("stored", [RELEASED, *CONFIGURATIONS.values()])
def test_out_and_in_again(stored):
    """Also by way of transformers' own classes, which add their defaults."""
    config = Config.from_huggingface(stored)
    written = config.to_huggingface(config.vocabulary, IDS)
    assert Config.from_huggingface(written) == config
    transformers = pytest.importorskip("transformers")
    assert Config.from_huggingface(transformers.AutoConfig.for_model(**written).to_dict()) == config
    assert Config.from_huggingface(transformers.AutoConfig.for_model(**stored).to_dict()) == config


@pytest.mark.parametrize(
    "part, key, value, message",
    [
        ("text_config", "hidden_size", None, "text_config of a Qwen3-VL config: hidden_size is None; expected a positive integer"),
        ("text_config", "hidden_act", "gelu", "hidden_act of text is 'gelu'; Qwen3-VL has 'silu'"),
        ("text_config", "attention_bias", True, "attention_bias of text is True"),
        ("text_config", "rope_scaling", {"rope_type": "yarn", "mrope_section": [24, 20, 20]}, "rope_type of text is 'yarn'"),
        ("text_config", "rope_scaling", {"mrope_interleaved": False, "mrope_section": [24, 20, 20]}, "mrope_interleaved is False"),
        (
            "text_config",
            "head_dim",
            96,
            "mrope_section is (24, 20, 20); expected three numbers that add up to half a head's width, 96",
        ),
        ("text_config", "num_key_value_heads", 5, "16 attention heads cannot share 5 key-value heads"),
        ("text_config", "num_hidden_layers", 10**6, "1000000 layers"),
        ("vision_config", "hidden_act", "silu", "hidden_act of vision is 'silu'"),
        ("vision_config", "temporal_patch_size", 1, "temporal_patch_size is 1"),
        ("vision_config", "rope_parameters", {"rope_theta": 1000.0}, "rope_theta of vision is 1000.0"),
        ("vision_config", "num_heads", 24, "hidden_size of 1024 cannot be split over 24 heads"),
        ("vision_config", "num_position_embeddings", 2300, "num_position_embeddings is 2300; expected a square number"),
        (
            "vision_config",
            "deepstack_visual_indexes",
            [5, 24],
            "deepstack_visual_indexes is [5, 24]; expected ascending numbers from 0 to 23",
        ),
        ("vision_config", "deepstack_visual_indexes", [11, 5], "deepstack_visual_indexes is [11, 5]; expected ascending numbers"),
        ("vision_config", "deepstack_visual_indexes", [], "deepstack_visual_indexes is []; expected ascending numbers"),
        ("vision_config", "out_hidden_size", 1024, "out_hidden_size is 1024; expected the text's hidden_size, 2048"),
    ],
)
def test_what_never_was_is_refused(part, key, value, message):
    with pytest.raises(UserError) as caught:
        Config.from_huggingface(changed(part, key, value))
    assert message in str(caught.value)


@pytest.mark.parametrize("sizes", [{"patch_size": 14}, {"patch_size": 16, "merge_size": 4}, {}])
def test_a_preprocessor_of_another_model_is_refused(sizes):
    """A preprocessor without sizes is one for patches of 14 pixels, as in transformers."""
    config = Config.from_huggingface(RELEASED)
    with pytest.raises(UserError, match="patch and merge sizes are .* in preprocessor_config.json and .16, 2. in config.json"):
        config.with_preprocessor(sizes, Path("preprocessor_config.json"))
