"""config.json in and out, and what PaliGemma never had."""

import dataclasses
import json

import pytest

from metaembed_jax.backbones.paligemma.config import Config
from metaembed_jax.backbones.paligemma.inputs import Images
from metaembed_jax.errors import UserError
from tests.backbones.paligemma.reference import CONFIGURATIONS, SPECIAL_TOKENS

IDS = {token: number for number, token in enumerate(SPECIAL_TOKENS)}

# As on the hub, where defaults are left out.
PALIGEMMA_448 = json.loads("""{
  "bos_token_id": 2, "eos_token_id": 1, "hidden_size": 2048, "ignore_index": -100, "image_token_index": 257152,
  "model_type": "paligemma", "pad_token_id": 0, "projection_dim": 2048,
  "text_config": {"hidden_size": 2048, "intermediate_size": 16384, "model_type": "gemma", "num_attention_heads": 8,
    "num_hidden_layers": 18, "num_image_tokens": 1024, "num_key_value_heads": 1, "torch_dtype": "float32", "vocab_size": 257216},
  "vision_config": {"hidden_size": 1152, "image_size": 448, "intermediate_size": 4304, "model_type": "siglip_vision_model",
    "num_attention_heads": 16, "num_hidden_layers": 27, "num_image_tokens": 1024, "patch_size": 14,
    "projection_dim": 2048, "projector_hidden_act": "gelu_fast", "vision_use_head": false}}""")


def test_the_released_config():
    config = Config.from_huggingface(PALIGEMMA_448)
    assert (config.text_config.head_dim, config.layout.multiple, config.vocabulary) == (256, 1024, 257216)
    assert config.default_row(None) == (2432, 2048)
    assert not config.text_config.is_gemma2


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_out_and_back(name):
    config = Config.from_huggingface(CONFIGURATIONS[name])
    out = json.loads(json.dumps(config.to_huggingface(config.vocabulary + 80, IDS)))
    back = Config.from_huggingface(out)
    assert back == dataclasses.replace(config, text_config=dataclasses.replace(config.text_config, vocab_size=400))


WRONG = [
    ("text_config", "model_type", "gemma3", "model_type of text is 'gemma3'; PaliGemma has 'gemma'"),
    ("text_config", "attention_bias", True, "attention_bias is True"),
    ("text_config", "hidden_activation", "silu", "hidden_activation is 'silu'"),
    ("text_config", "layer_types", ["full_attention"] * 5, "layer_types is"),
    ("text_config", "sliding_window", None, "sliding_window is None; expected a positive integer"),
    ("text_config", "attn_logit_softcapping", None, "attn_logit_softcapping is None; expected a positive number"),
    ("text_config", "attn_logit_softcapping", 0, "attn_logit_softcapping is 0; expected a positive number"),
    ("text_config", "num_key_value_heads", 4, "6 attention heads cannot share 4 key-value heads"),
    ("text_config", "head_dim", 7, "head_dim 7 is odd"),
    ("text_config", "num_hidden_layers", 10**6, "layers"),
    ("text_config", "hidden_size", 64, "projection_dim is 60; PaliGemma has 64"),
    ("vision_config", "hidden_act", "gelu", "hidden_act of vision is 'gelu'"),
    ("vision_config", "image_size", 51, "image_size is 51; expected a multiple of patch_size, 10"),
    ("vision_config", "num_attention_heads", 5, "a hidden_size of 36 cannot be split over 5 heads"),
    ("vision_config", "hidden_size", None, "vision_config of a PaliGemma config: hidden_size is None; expected a positive integer"),
]


@pytest.mark.parametrize("part, key, value, message", WRONG)
def test_wrong_configs_are_refused(part, key, value, message):
    config = CONFIGURATIONS["gemma2"]
    with pytest.raises(UserError, match=message):
        Config.from_huggingface(config | {part: config[part] | {key: value}})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"size": {"height": 224, "width": 224}}, "224.*config.json has images of 50 x 50 pixels"),
        ({"size": {"shortest_edge": 50}}, "shortest_edge"),
        ({"resample": 2}, "resample=2 is not supported; expected 3"),
        ({"do_resize": False}, "do_resize=False"),
    ],
)
def test_wrong_preprocessors_are_refused(change, message):
    config = Config.from_huggingface(CONFIGURATIONS["gemma2"])
    preprocessor = Images.from_run(None, config, None).to_preprocessor(config)
    assert Images.from_preprocessor(preprocessor, config, 1) == Images(50, 10)
    with pytest.raises(UserError, match=message):
        Images.from_preprocessor(preprocessor | change, config, 1)
