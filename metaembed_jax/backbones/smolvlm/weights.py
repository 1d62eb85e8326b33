"""The weight map of SmolVLM, the names of tensors, and the text of the model card."""

from metaembed_jax.backbones import siglip
from metaembed_jax.backbones.weight_map import decoder_layers, linear, same

# The tensor of a checkpoint that each parameter is read from.
WEIGHT_MAP = {
    "embedding": same("text_model.embed_tokens.weight"),
    "final_norm.scale": same("text_model.norm.weight"),
    **decoder_layers("text_model.layers.{}", attention_bias=False),
    **siglip.weight_map("vision_model."),
    **linear("vision.projector", "connector.modality_projection.proj", bias=False),
}

UNUSED_KEYS = ("lm_head.weight",)  # predicts tokens; stored where it is not tied to the embedding

# Text of the model card of a transformers export; {query}, {last}, {width} and {head} are filled in.
USAGE = """\
```python
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained(DIRECTORY), AutoModel.from_pretrained(DIRECTORY)
prompt = "<|im_start|>User: Query: a red car<end_of_utterance>" + "<end_of_utterance>" * 10 + "\\n"
prompt += "".join(f"<|meta_query_{{i}}|>" for i in range({query}))
states = model(**tokenizer([prompt], return_tensors="pt")).last_hidden_state[:, -{query}:]
vectors = torch.nn.functional.normalize(states{head}, dim=-1)  # [1, {query}, {width}], nested
```

A document's prompt is `<|im_start|>User: {{text}}<end_of_utterance>`, or with an image
`<|im_start|>User:<image>Describe the image.<end_of_utterance>`, whose `<image>` is replaced by the tiles' as transformers'
`Idefics3Processor` does with the `image_seq_len` of this model; after it come the {query} query tokens and then
`<|meta_document_0|>` to `<|meta_document_{last}|>`, whose states are its vectors. With an image the model also takes what
`AutoImageProcessor.from_pretrained(DIRECTORY)` gives for it."""


def canonical_key(key: str) -> str:
    """Return the name in `WEIGHT_MAP` of a tensor of any known layout.

    Layouts are that of releases, with the prefix `model.`, and that of a model without its output layer.
    """
    return key.removeprefix("model.")


def stored_key(key: str) -> str:
    """Return the name in transformers' `Idefics3Model` of a tensor of `WEIGHT_MAP`; inverse of `canonical_key`."""
    return key
