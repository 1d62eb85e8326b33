"""Write a trained model as a directory that transformers and `MetaEmbed.from_pretrained` load; inverse of `read_backbone`.

config.json, model*.safetensors      the backbone with adapters merged; Meta Tokens are rows of the embedding table
tokenizer.json, tokenizer_config.json, preprocessor_config.json
                                     the vocabulary with <|meta_query_0|> ..., and the image sizes
head.safetensors                     the head, if there is one: "weight" [D, hidden]
README.md                            the model card
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer
from tqdm import tqdm

from metaembed_jax.backbones.family import FamilyImages, family
from metaembed_jax.checkpoints.huggingface import HEAD, INDEX, METADATA, SINGLE
from metaembed_jax.errors import UserError
from metaembed_jax.files import write_bytes, write_json
from metaembed_jax.inputs.texts import meta_token_names
from metaembed_jax.network import ModelConfig
from metaembed_jax.trainable import LORA

SHARD_BYTES = 5 * 10**9


def write_model(
    out: Path,
    config: ModelConfig,
    parameters: dict,
    tokenizer: Path,
    images: FamilyImages,
    metadata: dict,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write all files but README.md into an existing folder.

    Args:
      parameters: parameters of the network, without int8 kernels; or of a backbone alone, to write a released model.
      tokenizer: the file of the vocabulary.
      images: how images become patches: the family's `Images`.
      metadata: metadata of the model for config.json; that of its Meta Tokens is added.
      dtype: type of the stored tensors, "float32" or "bfloat16".
    """
    names = meta_token_names(config.query_tokens, config.document_tokens) if "meta_tokens" in parameters else []
    first, ids = _write_vocabulary(out, names, tokenizer, family(config.backbone).pad_token)
    rows = max(parameters["backbone"]["embedding"].shape[0], first + len(names))
    stored = config.architecture.to_huggingface(rows, ids) | {"dtype": dtype}
    if names:
        counts = {"query_tokens": config.query_tokens, "document_tokens": config.document_tokens}
        stored[METADATA] = metadata | counts | {"first_token": first, "embedding_dim": config.embedding_dim}
    write_json(out / "config.json", stored)
    write_json(out / "preprocessor_config.json", images.to_preprocessor(config.architecture))
    tensors, kind = _tensors(config, parameters, first, rows), jnp.dtype(dtype)
    _write_tensors(out, ((key, np.ascontiguousarray(tensor.astype(kind))) for key, tensor in tensors), shard_bytes)
    if "head" in parameters:
        weight = np.asarray(parameters["head"]["kernel"], np.float32).T.astype(kind)
        save_file({"weight": np.ascontiguousarray(weight)}, out / HEAD, {"format": "pt"})


def merged(parameters: dict, path: str, layer: int | None, scale: float) -> np.ndarray:
    """Return a parameter, or its layer of a stack, in float32 with its adapter merged.

    Args:
      parameters: parameters by path.
      scale: scale of adapters, alpha / rank.
    """

    def value(path: str) -> np.ndarray:
        return np.asarray(parameters[path] if layer is None else parameters[path][layer], np.float32)

    adapter = path.removesuffix(".kernel") + LORA
    if f"{adapter}a" not in parameters:
        return value(path)
    return value(path) + scale * (value(f"{adapter}a") @ value(f"{adapter}b"))


def _tensors(config: ModelConfig, parameters: dict, first: int, rows: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (key, float32 tensor) of all tensors of the files."""
    flat: dict[str, Any] = flatten_dict(parameters["backbone"], sep=".")
    known, scale = family(config.backbone), config.lora.alpha / config.lora.rank
    meta_tokens = np.asarray(parameters.get("meta_tokens", ()), np.float32)
    by_key: dict[str, list] = {}
    for path, source in known.weight_map.items():
        if path in flat:  # some versions of a family lack some parameters
            by_key.setdefault(source.key, []).append((path, source))
    for key, sources in by_key.items():
        sources = sorted(sources, key=lambda pair: pair[1].part)
        for layer in range(flat[sources[0][0]].shape[0]) if "{}" in key else (None,):
            tensor = np.concatenate([source.write(merged(flat, path, layer, scale)) for path, source in sources])
            if key == known.embedding_key:
                tensor = np.concatenate([tensor, np.zeros((rows - len(tensor), tensor.shape[1]), np.float32)])
                if len(meta_tokens):
                    tensor[first : first + len(meta_tokens)] = meta_tokens
            yield known.stored_key(sources[0][1].name(config.architecture, layer)), tensor


def _write_vocabulary(out: Path, names: list[str], file: Path, pad_token: str) -> tuple[int, dict[str, int]]:
    """Write the tokenizer with the Meta Tokens. Return the id of the first one (0: there are none), and of all added tokens."""
    tokenizer = Tokenizer.from_buffer(file.read_bytes())
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.no_padding()
    tokenizer.no_truncation()
    write_bytes(out / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    ids = [tokenizer.token_to_id(name) for name in names]
    first = (ids[0] if ids else None) or 0
    if ids != list(range(first, first + len(ids))):
        raise UserError(f"{file} has some of {names[0]} .. {names[-1]} under other ids; export the model before it was exported")
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad_token, "padding_side": "left"}
    write_json(out / "tokenizer_config.json", kind)
    return first, {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}


def _write_tensors(directory: Path, tensors: Iterator[tuple[str, np.ndarray]], limit: int) -> None:
    """Write one file, or files of at most `limit` bytes (or one tensor) and an index."""
    shards, shard, size, total = [], {}, 0, 0

    def flush() -> None:
        save_file(shard, directory / f"{len(shards)}.part", {"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for key, tensor in tqdm(tensors, desc="writing", unit="tensor", delay=2):
        if shard and size + tensor.nbytes > limit:
            flush()
            size = 0
        shard[key] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(shards) == 1:
        os.replace(directory / "0.part", directory / SINGLE)
        return
    index = {}
    for number, keys in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        os.replace(directory / f"{number}.part", directory / name)
        index |= dict.fromkeys(keys, name)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
