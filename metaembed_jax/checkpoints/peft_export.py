"""Write the adapters of a run in the format of PEFT, with its Meta Tokens and head.

adapter_config.json, adapter_model.safetensors    for PeftModel.from_pretrained(AutoModel of the base weights, DIRECTORY)
metaembed.safetensors                             "meta_tokens" [16 + 64, hidden], and "head" [D, hidden] if there is one
metaembed.json                                    the numbers of Meta Tokens, and the trained budgets
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from metaembed_jax.backbones.family import family
from metaembed_jax.backbones.weight_map import Source
from metaembed_jax.files import write_json
from metaembed_jax.network import ModelConfig
from metaembed_jax.trainable import LORA


def write_adapter(out: Path, config: ModelConfig, parameters: dict, metadata: dict) -> None:
    """Write all files but README.md into an existing folder, in float32."""
    known, flat = family(config.backbone), flatten_dict(parameters["backbone"], sep=".")
    tensors, targets = {}, []
    for path in sorted(path for path in flat if path.endswith(LORA + "a")):
        source = adapted_source(known.weight_map, path)
        a_LIr, b_LrO = (np.asarray(flat[path[:-1] + name], np.float32) for name in "ab")
        if "{}" not in source.key:
            a_LIr, b_LrO = a_LIr[None], b_LrO[None]
        for layer, (a, b) in enumerate(zip(a_LIr, b_LrO, strict=True)):
            name = known.stored_key(source.name(config.architecture, layer)).removesuffix(".weight")
            targets.append(name)
            tensors[f"base_model.model.{name}.lora_A.weight"] = np.ascontiguousarray(a.T)
            tensors[f"base_model.model.{name}.lora_B.weight"] = np.ascontiguousarray(b.T)
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    adapter = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": metadata["base"],
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "inference_mode": True,
    }
    write_json(out / "adapter_config.json", adapter)
    others = {"meta_tokens": np.asarray(parameters["meta_tokens"], np.float32)}
    if config.embedding_dim:
        others["head"] = np.ascontiguousarray(np.asarray(parameters["head"]["kernel"], np.float32).T)
    save_file(others, out / "metaembed.safetensors", {"format": "pt"})
    counts = {"query_tokens": config.query_tokens, "document_tokens": config.document_tokens}
    write_json(out / "metaembed.json", metadata | counts | {"embedding_dim": config.embedding_dim})


def adapted_source(weight_map: Mapping[str, Source], path: str) -> Source:
    """Return the source of the kernel that an adapter is for.

    Args:
      path: path of the adapter's `a` in the backbone.
    """
    return weight_map[path.removesuffix(LORA + "a") + ".kernel"]
