"""The weight map of PaliGemma, the names of tensors, and the text of the model card."""

from metaembed_jax.backbones import siglip
from metaembed_jax.backbones.weight_map import decoder_layers, linear, same

LANGUAGE, VISION = "language_model.model.", "vision_tower.vision_model."

# The tensor of a checkpoint that each parameter of either version is read from.
WEIGHT_MAP = {
    "embedding": same(LANGUAGE + "embed_tokens.weight"),
    "final_norm.scale": same(LANGUAGE + "norm.weight"),
    **decoder_layers(LANGUAGE + "layers.{}", attention_bias=False),
    # Gemma 2 has these in place of `mlp_norm`; its norm after attention has the name of Gemma's before the feed-forward.
    "layers.attention_post_norm.scale": same(LANGUAGE + "layers.{}.post_attention_layernorm.weight"),
    "layers.mlp_pre_norm.scale": same(LANGUAGE + "layers.{}.pre_feedforward_layernorm.weight"),
    "layers.mlp_post_norm.scale": same(LANGUAGE + "layers.{}.post_feedforward_layernorm.weight"),
    **siglip.weight_map(VISION),
    **linear("vision.projector", "multi_modal_projector.linear", bias=True),
}

UNUSED_KEYS = ("language_model.lm_head.weight",)  # predicts tokens; stored where it is not tied to the embedding

# Text of the model card of a transformers export; {query}, {last}, {width} and {head} are filled in.
USAGE = """\
```python
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained(DIRECTORY), AutoModel.from_pretrained(DIRECTORY)
prompt = "<bos>Query: a red car" + "<pad>" * 10 + "\\n" + "".join(f"<|meta_query_{{i}}|>" for i in range({query}))
batch = tokenizer([prompt], return_tensors="pt", add_special_tokens=False)
batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])  # 0: a prefix, whose tokens see each other
batch["token_type_ids"][:, -{query}:] = 1  # 1: Meta Tokens, which are causal
states = model(**batch).last_hidden_state[:, -{query}:]
vectors = torch.nn.functional.normalize(states{head}, dim=-1)  # [1, {query}, {width}], nested
```

A document's prompt is `<bos>{{text}}\\n`, or with an image `<image>...<image><bos>Describe the image.\\n`, with one `<image>` for
each patch; after it come the {query} query tokens and then `<|meta_document_0|>` to `<|meta_document_{last}|>`, whose states are
its vectors. Of both kinds of Meta Tokens the type is 1."""


def canonical_key(key: str) -> str:
    """Return the name in `WEIGHT_MAP` of a tensor of any known layout.

    Layouts are the released one, as in `WEIGHT_MAP`; that of transformers 5, without `vision_model`; and the names in its
    models, `language_model.layers`, with the prefix `model.` and an `lm_head` where there is an output layer.
    """
    key = key.removeprefix("model.")
    if key == "lm_head.weight":
        return UNUSED_KEYS[0]
    for start, whole in (("language_model.", LANGUAGE), ("vision_tower.", VISION)):
        if key.startswith(start) and not key.startswith(whole) and key not in UNUSED_KEYS:
            return whole + key.removeprefix(start)
    return key


def stored_key(key: str) -> str:
    """Return the name in transformers' `PaliGemmaModel` of a tensor of `WEIGHT_MAP`; inverse of `canonical_key`."""
    return key.replace(LANGUAGE, "language_model.", 1).replace(VISION, "vision_tower.", 1)
