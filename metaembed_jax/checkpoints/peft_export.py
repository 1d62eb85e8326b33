"""The adapters of a run as PEFT stores them, and its Meta Tokens and head beside them.

adapter_config.json, adapter_model.safetensors    for PeftModel.from_pretrained(AutoModel of the base, DIRECTORY)
metaembed.safetensors                             "meta_tokens" [16 + 64, hidden], and "head" [D, hidden] if there is one
metaembed.json                                    their numbers, and the budgets they were trained for
"""

from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from metaembed_jax.backbones.family import Family, family
from metaembed_jax.backbones.weight_map import Source
from metaembed_jax.files import write_json
from metaembed_jax.network import ModelConfig
from metaembed_jax.trainable import LORA


def write_adapter(out: Path, config: ModelConfig, parameters: dict, metadata: dict) -> None:
    """Writes everything but the README.md into a folder that exists; float32."""
    module, flat = family(config.backbone), flatten_dict(parameters["backbone"], sep=".")
    tensors, targets = {}, []
    for path in sorted(path for path in flat if path.endswith(LORA + "a")):
        source = adapted_source(module, path)
        a_LIr, b_LrO = (np.asarray(flat[path[:-1] + name], np.float32) for name in "ab")
        if "{}" not in source.key:
            a_LIr, b_LrO = a_LIr[None], b_LrO[None]
        for layer, (a, b) in enumerate(zip(a_LIr, b_LrO, strict=True)):
            name = module.stored_key(source.name(config.architecture, layer)).removesuffix(".weight")
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
    beside = {"meta_tokens": np.asarray(parameters["meta_tokens"], np.float32)}
    if config.embedding_dim:
        beside["head"] = np.ascontiguousarray(np.asarray(parameters["head"]["kernel"], np.float32).T)
    save_file(beside, out / "metaembed.safetensors", {"format": "pt"})
    counts = {"query_tokens": config.query_tokens, "document_tokens": config.document_tokens}
    write_json(out / "metaembed.json", metadata | counts | {"embedding_dim": config.embedding_dim})


def adapted_source(family: Family, path: str) -> Source:
    """The tensor that an adapter is for.

    Args:
      path: in the backbone, of the adapter's `a`.
    """
    return family.weight_map[path.removesuffix(LORA + "a") + ".kernel"]
