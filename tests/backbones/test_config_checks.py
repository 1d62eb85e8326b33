"""Keys of config.json and preprocessor_config.json that are duplicate, old or absent, against transformers."""

import importlib
from pathlib import Path

import pytest

from metaembed_jax.backbones.config_checks import rotary
from metaembed_jax.backbones.family import family
from metaembed_jax.errors import UserError
from tests.backbones.llama_vision.reference import CONFIGURATIONS as LLAMA
from tests.backbones.paligemma.reference import CONFIGURATIONS as PALIGEMMA
from tests.backbones.qwen2_5_vl.reference import CONFIGURATIONS as QWEN2
from tests.backbones.qwen3_vl.reference import CONFIGURATIONS as QWEN3
from tests.backbones.smolvlm.reference import CONFIGURATIONS as SMOLVLM

STORED = {
    "mllama": LLAMA["small"],
    "paligemma": PALIGEMMA["gemma"],
    "qwen2_5_vl": QWEN2["grouped"],
    "qwen3_vl": QWEN3["grouped"],
    "idefics3": SMOLVLM["marked"],
}
LINEAR = {"type": "linear", "factor": 2.0}
ROTARY = [
    {},
    {"rope_theta": 77.0},
    {"rope_theta": 77.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
    {"rope_theta": 77.0, "rope_parameters": {"rope_type": "default"}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}, "rope_scaling": {"rope_type": "default", "rope_theta": 6.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}, "rope_scaling": LINEAR},
    {"rope_theta": 77.0, "rope_scaling": LINEAR},
    {"rope_theta": 77.0, "rope_scaling": None},
]


@pytest.mark.parametrize("text", ROTARY)
def test_rotary_is_what_transformers_reads(text):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GemmaConfig(**text).rope_parameters
    ours = {"rope_theta": 10000.0} | {key: value for key, value in rotary(text).items() if value is not None}
    assert (ours["rope_theta"], ours["rope_type"]) == (theirs["rope_theta"], theirs["rope_type"])


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_a_scaled_rope_is_refused_wherever_it_stands(name, key):
    stored, kind = STORED[name], family(name).Config
    text = {**stored["text_config"], key: LINEAR | {"mrope_section": [7, 3, 2]}}
    with pytest.raises(UserError, match="rope_type.* is 'linear'"):
        kind.from_huggingface(stored | {"text_config": text})


@pytest.mark.parametrize("name", STORED)
def test_the_base_beside_the_parameters_is_the_older_one(name):
    stored, kind = STORED[name], family(name).Config
    text = {**stored["text_config"], "rope_theta": 77.0}
    assert kind.from_huggingface(stored | {"text_config": text}) == kind.from_huggingface(stored)


@pytest.mark.parametrize(
    "name, module, processor",
    [
        ("mllama", "mllama.image_processing_pil_mllama", "MllamaImageProcessorPil"),
        ("paligemma", "siglip.image_processing_pil_siglip", "SiglipImageProcessorPil"),
        ("idefics3", "idefics3.image_processing_pil_idefics3", "Idefics3ImageProcessorPil"),
        ("qwen2_5_vl", "qwen2_vl.image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil"),
        ("qwen3_vl", "qwen2_vl.image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil"),
    ],
)
def test_a_preprocessor_without_mean_and_deviation_has_those_of_its_class(name, module, processor):
    pytest.importorskip("torch")
    theirs = getattr(importlib.import_module(f"transformers.models.{module}"), processor)()
    stored, kind = STORED[name], family(name).Config
    config = kind.from_huggingface(stored)
    vision = config.with_preprocessor({"patch_size": config.vision_config.patch_size}, Path("here")).vision_config
    assert (list(vision.image_mean), list(vision.image_std)) == (list(theirs.image_mean), list(theirs.image_std))
