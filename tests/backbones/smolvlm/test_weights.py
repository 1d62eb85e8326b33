"""The layouts of SmolVLM checkpoints in circulation, and the names that stock transformers reads."""

import pytest
from safetensors.numpy import load_file

from metaembed_jax.backbones.smolvlm.weights import UNUSED_KEYS, WEIGHT_MAP, canonical_key, stored_key
from tests.backbones.smolvlm.reference import CONFIGURATIONS, write_checkpoint

pytest.importorskip("torch")


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_layout_has_the_same_names(name, tmp_path):
    """Layouts: as released and written by transformers; and of a model without output layer, as in exports."""
    from transformers import Idefics3ForConditionalGeneration

    configuration = CONFIGURATIONS[name]
    write_checkpoint(tmp_path, configuration)
    depth = {"layers": configuration["text_config"], "vision.blocks": configuration["vision_config"]}
    depth = {path: config["num_hidden_layers"] for path, config in depth.items()}
    expected = {
        source.key.format(layer)
        for path, source in WEIGHT_MAP.items()
        for layer in range(next((count for start, count in depth.items() if path.startswith(start)), 1))
    }
    saved = {key for file in tmp_path.glob("*.safetensors") for key in load_file(file)}
    assert ("lm_head.weight" in saved) == (name == "marked") and "model.text_model.norm.weight" in saved
    core = dict(Idefics3ForConditionalGeneration.from_pretrained(tmp_path).model.named_parameters()).keys()
    for layout in (saved, core):
        assert {canonical_key(key) for key in layout} - set(UNUSED_KEYS) == expected
    assert core == {stored_key(key) for key in expected}
