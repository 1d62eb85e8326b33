"""The architecture from config.json and back, and what is refused."""

import copy
import json

import pytest

from metaembed_jax.backbones.llama_vision.config import Config
from metaembed_jax.errors import UserError
from tests.backbones.llama_vision.reference import BEGIN, CONFIGURATIONS, END, IMAGE

IDS = {BEGIN: 0, END: 1, IMAGE: 300}
RELEASED = {
    "model_type": "mllama",
    "image_token_index": 128256,
    "text_config": {
        "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "vocab_size": 128256,
    },
    "vision_config": {
        "attention_heads": 16,
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "image_size": 560,
        "intermediate_layers_indices": [3, 7, 15, 23, 30],
        "intermediate_size": 5120,
        "max_num_tiles": 4,
        "norm_eps": 1e-05,
        "num_channels": 3,
        "num_global_layers": 8,
        "num_hidden_layers": 32,
        "patch_size": 14,
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        "vision_output_dim": 7680,
    },
}


def changed(part, **values):
    config = copy.deepcopy(RELEASED)
    config[part].update(values)
    return config


def written(config):
    return json.loads(json.dumps(config.to_huggingface(config.vocabulary, IDS)))


def test_the_layout_of_the_released_checkpoints_is_read():
    config = Config.from_huggingface(RELEASED)
    assert (config.width, config.vocabulary, config.layout.multiple, config.default_row(None)) == (4096, 128264, 6400, (640, 12800))
    assert config.text_config.factor == 8 and config.text_config.rope_theta == 500000
    assert config == Config.from_huggingface(written(config))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_transformers_reads_what_is_written(name):
    """The architecture is the same; ropes without scaling are read back with a scaling of 1."""
    transformers = pytest.importorskip("transformers")
    config = Config.from_huggingface(CONFIGURATIONS[name])
    read = transformers.MllamaConfig(**written(config)).to_dict()
    assert Config.from_huggingface(read) == config
    assert (read["text_config"]["vocab_size"], read["image_token_index"]) == (300, 300)


@pytest.mark.parametrize(
    "part, values, message",
    [
        ("text_config", {"hidden_size": None}, "hidden_size is None; expected a positive integer"),
        ("text_config", {"cross_attention_layers": [3, 40]}, "cross_attention_layers"),
        ("text_config", {"cross_attention_layers": [8, 3]}, "cross_attention_layers"),
        ("text_config", {"cross_attention_layers": []}, "cross_attention_layers"),
        ("text_config", {"cross_attention_layers": [3, 3]}, "cross_attention_layers"),
        ("text_config", {"num_key_value_heads": 5}, "cannot share 5 key-value heads"),
        ("text_config", {"rope_scaling": {"rope_type": "yarn"}}, "rope_type"),
        ("text_config", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
        ("text_config", {"rope_scaling": 8}, "rope_scaling is 8"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act of text"),
        ("text_config", {"num_hidden_layers": 10**6}, "layers; expected at most"),
        ("vision_config", {"image_size": [560, 448]}, "image_size"),
        ("vision_config", {"image_size": 561}, "expected a multiple of patch_size"),
        ("vision_config", {"attention_heads": 3}, "cannot be split"),
        ("vision_config", {"hidden_act": "quick_gelu"}, "hidden_act of vision"),
        ("vision_config", {"num_channels": 1}, "num_channels"),
        ("vision_config", {"intermediate_layers_indices": [3, 32]}, "intermediate_layers_indices"),
        ("vision_config", {"intermediate_layers_indices": [-1]}, "intermediate_layers_indices"),
        ("vision_config", {"vision_output_dim": 7681}, "vision_output_dim"),
        ("vision_config", {"max_num_tiles": 6}, "supported_aspect_ratios"),
        ("vision_config", {"max_num_tiles": 10**9}, "max_num_tiles"),
        ("vision_config", {"supported_aspect_ratios": [[1, 1], [2, 1]]}, "supported_aspect_ratios"),
    ],
)
def test_what_no_checkpoint_has_is_refused(part, values, message):
    with pytest.raises(UserError, match=message):
        Config.from_huggingface(changed(part, **values))
