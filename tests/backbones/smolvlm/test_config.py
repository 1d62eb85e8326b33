"""config.json in and out, and what SmolVLM never had."""

import dataclasses
import json

import pytest

from metaembed_jax.backbones.smolvlm.config import Config
from metaembed_jax.config import load_config
from metaembed_jax.errors import UserError
from metaembed_jax.network_config import model_config
from tests.backbones.smolvlm.reference import CONFIGURATIONS, NEEDED

IDS = {token: number for number, token in enumerate(NEEDED)}

# As on the hub, where defaults are left out, and keys stand that transformers does not read.
SMOLVLM_256M = json.loads("""{
  "image_token_id": 49190, "model_type": "idefics3", "pad_token_id": 128002, "scale_factor": 4, "tie_word_embeddings": false,
  "text_config": {"head_dim": 64, "hidden_size": 576, "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
    "is_llama_config": true, "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 9,
    "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2, "pixel_shuffle_factor": 4, "qk_layer_norms": false,
    "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_theta": 100000, "use_resampler": false, "vocab_size": 49280},
  "vision_config": {"hidden_size": 768, "image_size": 512, "max_image_size": {"longest_edge": 512},
    "num_attention_heads": 12, "patch_size": 16, "size": {"longest_edge": 2048}}}""")


def test_the_released_config_is_that_of_the_run():
    config = Config.from_huggingface(SMOLVLM_256M)
    assert (config.width, config.vocabulary, config.layout.multiple, config.vision_config.tile_units) == (576, 49280, 1024, 64)
    assert config.default_row(None) == (1920, 21 * 1024)
    assert config == model_config(load_config("configs/smolvlm_256m.py")).architecture


def test_pixels_that_fill_no_patch_and_as_many_key_heads_as_heads():
    """A config as in SmolVLM-Instruct."""
    text = {"vocab_size": 49155, "hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 8192}
    vision = {"hidden_size": 1152, "num_attention_heads": 16, "image_size": 384, "patch_size": 14}
    config = Config.from_huggingface({"text_config": text, "vision_config": vision, "scale_factor": 3})
    assert (config.layout.multiple, config.vision_config.tile_units, config.text_config.head_width) == (27 * 27, 81, 64)
    eight = Config.from_huggingface({"text_config": text | {"num_attention_heads": 8}, "vision_config": {"patch_size": 16}})
    assert eight.text_config.num_key_value_heads == 8


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_transformers_reads_what_is_written(name):
    transformers = pytest.importorskip("transformers")
    config = Config.from_huggingface(CONFIGURATIONS[name])
    out = json.loads(json.dumps(config.to_huggingface(config.vocabulary + 80, IDS)))
    grown = dataclasses.replace(config, text_config=dataclasses.replace(config.text_config, vocab_size=config.vocabulary + 80))
    read = transformers.Idefics3Config(**out).to_dict()
    assert Config.from_huggingface(out) == Config.from_huggingface(read) == grown
    assert (read["image_token_id"], read["text_config"]["pad_token_id"]) == (IDS["<image>"], IDS["<|im_end|>"])


WRONG = [
    ("text_config", "hidden_size", None, "text_config of a SmolVLM config: hidden_size is None; expected a positive integer"),
    ("text_config", "model_type", "qwen2", "model_type of text is 'qwen2'; SmolVLM has 'llama'"),
    ("text_config", "num_key_value_heads", 3, "4 attention heads cannot share 3 key-value heads"),
    ("text_config", "head_dim", 14, "head_dim is 14; SmolVLM has 12"),
    ("text_config", "attention_bias", True, "attention_bias is True"),
    ("text_config", "mlp_bias", True, "mlp_bias is True"),
    ("text_config", "rope_parameters", {"rope_type": "llama3"}, "rope_type is 'llama3'"),
    ("text_config", "hidden_act", "gelu", "hidden_act of text is 'gelu'"),
    ("text_config", "num_hidden_layers", 10**6, "layers; expected at most"),
    ("vision_config", "hidden_act", "gelu", "hidden_act of vision is 'gelu'"),
    ("vision_config", "num_channels", 1, "num_channels is 1"),
    ("vision_config", "num_attention_heads", 4, "a hidden_size of 30 cannot be split over 4 heads"),
    ("vision_config", "image_size", [24, 24], "image_size is"),
    ("vision_config", "image_size", 27, "image_size is 27; expected an even number"),
    ("vision_config", "image_size", 2, "has 0 patches"),
    ("vision_config", "image_size", 100, "has 25 patches of patch_size 4 on a side; expected 1 to 32 except 19, 25, 29, 31"),
    ("vision_config", "image_size", 10**6, "expected 1 to 32 except"),
    ("vision_config", "image_size", 20, "has 5 patches of patch_size 4 on a side; expected a multiple of scale_factor, 3"),
    ("vision_config", "scale_factor", 0, "scale_factor is 0; expected a positive integer"),
]


@pytest.mark.parametrize("part, key, value, message", WRONG)
def test_wrong_configs_are_refused(part, key, value, message):
    config = CONFIGURATIONS["marked"]
    with pytest.raises(UserError, match=message):
        Config.from_huggingface(config | {part: config[part] | {key: value}})


@pytest.mark.parametrize("side", [3, 26, 27, 32, 25])
def test_places_in_a_tile_are_those_of_transformers(side):
    """Positions are in raster order; for 25 patches on a side, which are refused, two patches would share a position."""
    torch, module = pytest.importorskip("torch"), pytest.importorskip("transformers.models.idefics3.modeling_idefics3")
    embeddings = module.Idefics3VisionEmbeddings(module.Idefics3VisionConfig(hidden_size=1, image_size=side, patch_size=1))
    with torch.no_grad():
        embeddings.patch_embedding.weight.zero_(), embeddings.patch_embedding.bias.zero_()
        embeddings.position_embedding.weight[:, 0] = torch.arange(side**2)
        positions = embeddings(torch.zeros(1, 3, side, side), torch.ones(1, side, side, dtype=torch.bool))[0, :, 0]
    assert (positions.tolist() == list(range(side**2))) == (side != 25)
