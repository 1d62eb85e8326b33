"""The weight map of Llama-3.2-Vision, the names of tensors, and the text of the model card."""

from metaembed_jax.backbones.llama_vision.config import Config
from metaembed_jax.backbones.weight_map import Source, linear, norm, patches, same

LAYER = "language_model.layers.{}"


def _attention(path: str, name: str) -> dict[str, Source]:
    """Return the source of a linear map of all layers; its tensor's name depends on whether the layer attends to images."""

    def names(architecture: Config, layer: int) -> tuple[int, str]:
        return layer, "cross_attn" if layer in architecture.text_config.cross_attention_layers else "self_attn"

    return {path: source._replace(names=names) for path, source in linear(path, LAYER + ".{}." + name, bias=False).items()}


def _crossing(name: str) -> Source:
    """Return the source of a parameter of the cross-attention layers; the files number them among all layers."""
    return same(f"{LAYER}.{name}")._replace(
        names=lambda architecture, layer: (architecture.text_config.cross_attention_layers[layer],)
    )


def _vision_layers(path: str, key: str) -> dict[str, Source]:
    return {
        **norm(f"{path}.attention_norm", f"{key}.input_layernorm"),
        **norm(f"{path}.mlp_norm", f"{key}.post_attention_layernorm"),
        **linear(f"{path}.query", f"{key}.self_attn.q_proj", bias=False),
        **linear(f"{path}.key", f"{key}.self_attn.k_proj", bias=False),
        **linear(f"{path}.value", f"{key}.self_attn.v_proj", bias=False),
        **linear(f"{path}.output", f"{key}.self_attn.o_proj", bias=False),
        **linear(f"{path}.mlp.up", f"{key}.mlp.fc1", bias=True),
        **linear(f"{path}.mlp.down", f"{key}.mlp.fc2", bias=True),
    }


# The tensor of a checkpoint that each parameter is read from.
WEIGHT_MAP = {
    "embedding": same("language_model.embed_tokens.weight"),
    "final_norm.scale": same("language_model.norm.weight"),
    "layers.input_norm.scale": same(f"{LAYER}.input_layernorm.weight"),
    "layers.mlp_norm.scale": same(f"{LAYER}.post_attention_layernorm.weight"),
    **_attention("layers.query", "q_proj"),
    **_attention("layers.key", "k_proj"),
    **_attention("layers.value", "v_proj"),
    **_attention("layers.output", "o_proj"),
    **linear("layers.mlp.gate", f"{LAYER}.mlp.gate_proj", bias=False),
    **linear("layers.mlp.up", f"{LAYER}.mlp.up_proj", bias=False),
    **linear("layers.mlp.down", f"{LAYER}.mlp.down_proj", bias=False),
    "crossing.query_norm.scale": _crossing("cross_attn.q_norm.weight"),
    "crossing.key_norm.scale": _crossing("cross_attn.k_norm.weight"),
    "crossing.attention_gate": _crossing("cross_attn_attn_gate"),
    "crossing.mlp_gate": _crossing("cross_attn_mlp_gate"),
    "vision.patch_embedding.kernel": patches("vision_model.patch_embedding.weight"),
    "vision.class_embedding": same("vision_model.class_embedding"),
    "vision.before_tiles.embedding": same("vision_model.pre_tile_positional_embedding.embedding.weight"),
    "vision.before_tiles.gate": same("vision_model.pre_tile_positional_embedding.gate"),
    "vision.position_embedding": same("vision_model.gated_positional_embedding.embedding"),
    "vision.tile_positions.embedding": same("vision_model.gated_positional_embedding.tile_embedding.weight"),
    "vision.tile_positions.gate": same("vision_model.gated_positional_embedding.gate"),
    **norm("vision.norm_before", "vision_model.layernorm_pre"),
    **_vision_layers("vision.layers", "vision_model.transformer.layers.{}"),
    **norm("vision.norm_after", "vision_model.layernorm_post"),
    "vision.after_tiles.embedding": same("vision_model.post_tile_positional_embedding.embedding.weight"),
    "vision.after_tiles.gate": same("vision_model.post_tile_positional_embedding.gate"),
    **_vision_layers("vision.global_layers", "vision_model.global_transformer.layers.{}"),
    "vision.global_layers.attention_gate": same("vision_model.global_transformer.layers.{}.gate_attn"),
    "vision.global_layers.mlp_gate": same("vision_model.global_transformer.layers.{}.gate_ffn"),
    **linear("vision.projector", "multi_modal_projector", bias=True),
}

UNUSED_KEYS = ("lm_head.weight",)  # predicts tokens

# Text of the model card of a transformers export; {query}, {last}, {width} and {head} are filled in.
USAGE = """\
```python
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained(DIRECTORY), AutoModel.from_pretrained(DIRECTORY)
prompt = "<|begin_of_text|>Query: a red car<|end_of_text|>" + "<|end_of_text|>" * 10 + "\\n"
prompt += "".join(f"<|meta_query_{{i}}|>" for i in range({query}))
inputs = tokenizer([prompt], return_tensors="pt", add_special_tokens=False)
states = model(**inputs).last_hidden_state[:, -{query}:]
vectors = torch.nn.functional.normalize(states{head}, dim=-1)  # [1, {query}, {width}], nested
```

A document's prompt is `<|begin_of_text|>{{text}}<|end_of_text|>`, or with an image
`<|image|><|begin_of_text|>Describe the image.<|end_of_text|>`; after it come the {query} query tokens and then
`<|meta_document_0|>` to `<|meta_document_{last}|>`, whose states are its vectors. With an image the model also takes what
`AutoImageProcessor.from_pretrained(DIRECTORY)` gives for `[[image]]`, and a `cross_attention_mask` [1, tokens, 1, tiles], which is
1 for the first `num_tiles` tiles from the image token to the end, Meta Tokens included. Texts without an image need their own
batches."""


def canonical_key(key: str) -> str:
    """Return the name in `WEIGHT_MAP` of a tensor of any known layout; it is that of transformers' `MllamaModel`.

    Layouts are `language_model.model.layers` and `vision_model` (as released, and as transformers saves models with an output
    layer), `model.language_model.layers` and `model.vision_model` (the names of those in memory), and `language_model.layers` and
    `vision_model` (models without an output layer).
    """
    for new, old in (("model.", ""), ("language_model.model.", "language_model."), ("language_model.lm_head.", "lm_head.")):
        if key.startswith(new):
            return old + key.removeprefix(new)
    return key


def stored_key(key: str) -> str:
    """Return the name in transformers' `MllamaModel` of a tensor of `WEIGHT_MAP`; inverse of `canonical_key`."""
    return key
