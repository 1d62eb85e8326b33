"""The families of backbones. A family is a package; what it must have is all that the rest of the library knows of it:

    TITLE                   its name in messages
    Config                  the architecture: a frozen dataclass of dataclasses, whose fields have Hugging Face's names
        .from_huggingface(config)                     from the content of a config.json, all of it checked (see `fields`)
        .to_huggingface(vocabulary, token_ids)        and back, for a table of so many rows; the ids of all added tokens
        .with_preprocessor(preprocessor, place)       with what preprocessor_config.json fixes: the mean and deviation of pixels
        .check()                                      refuses sizes that do not fit each other
        .width, .vocabulary                           of the language model's states; rows of its embedding table
        .layout                                       the arrays of a batch that not every family has: `batch.items.Layout`
        .default_row                                  tokens and patches of a row where a run names none
    Images                  how an image becomes patches: a frozen dataclass
        .from_preprocessor(preprocessor, config, max_visual_tokens)
        .from_run(data, config, max_visual_tokens)    from `config.data` of a run; no cap: None
        .to_preprocessor(config)                      a preprocessor_config.json that transformers reads
    Processor(tokenizer, images, limits)              items to `batch.items.Example`s; survives pickling: `inputs.processors`
        .query(item, *, name), .candidate(...), .images
        .size(item, side, *, name)                    the size of the example, without decoding: `batch.items.Fitted`
    SPECIAL_TOKENS, PAD_TOKEN, PROMPT_WORDS           of its prompts; the last for vocabularies made from scratch
    Backbone(config, *, rngs)                         the network, an nnx module: parameters with logical axes, of stacks [L, ...]
        .embedding, .width                            the vocabulary [V, D], and D
        (batch, meta_RD, *, dtype, checkpoint, unroll)
                                                      a batch, the Meta Tokens -> final states [B, V, D] at `batch.reads`
    KEYS, UNUSED_KEYS, EMBEDDING_KEY                  the tensor that each parameter is read from (see `conversion`)
    canonical_key(key), stored_key(key)               from any layout in circulation to the names in KEYS, and on to transformers'
    parts(config, row)                                its arithmetic on a row, a `Size` (see `parts`)
    USAGE                   text of a model card: how stock transformers computes the vectors
    SENTENCE_TRANSFORMERS   the file with a module of sentence-transformers, or None

Parameters named `kernel` are those of `layers.Linear`s: they can carry adapters and be int8; `config.trained` names them by path.
"""

import importlib
from types import ModuleType

from metaembed_jax.errors import UserError

# The package of each `model_type` of a config.json.
FAMILIES = {
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "paligemma": "paligemma",
    "mllama": "llama_vision",
    "idefics3": "smolvlm",
}


def family(name: str) -> ModuleType:
    """The family of a `model_type`.

    Raises:
      UserError: no such family.
    """
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"unknown backbone {name!r}: known are {', '.join(sorted(FAMILIES))}")
    return importlib.import_module(f"{__name__}.{FAMILIES[name]}")
