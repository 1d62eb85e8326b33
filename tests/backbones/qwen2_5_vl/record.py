"""Qwen2.5-VL in the tests of all families."""

from metaembed_jax.config import load_config
from tests.backbones.families import Record
from tests.backbones.qwen2_5_vl.reference import CONFIGURATIONS, DOCUMENTS, QUERIES, string, write_checkpoint


def stock_vectors(directory, items, side, model=None):
    """Return the vectors of an export, or of another `model` with its tokenizer."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = AutoModel.from_pretrained(directory).eval() if model is None else model
    tokenizer, images = AutoTokenizer.from_pretrained(directory), Qwen2VLImageProcessorPil.from_pretrained(directory)
    items = [item if isinstance(item, str | dict) else {"image": item} for item in items]
    seen = images([item["image"] for item in items if isinstance(item, dict)], return_tensors="pt")
    counts = iter((seen["image_grid_thw"].prod(-1) // 4).tolist())
    suffix = "".join(f"<|meta_query_{number}|>" for number in range(16))
    suffix += "".join(f"<|meta_document_{number}|>" for number in range(64)) if side == "document" else ""
    prompts = [string(item, side, counts) + suffix for item in items]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    kinds = (batch["input_ids"] == model.config.image_token_id).int()
    with torch.no_grad():
        states = model(**batch, **seen, mm_token_type_ids=kinds).last_hidden_state
    states = states[:, -(16 if side == "query" else 64) :]
    if (directory / "head.safetensors").is_file():
        states = states @ load_file(directory / "head.safetensors")["weight"].T
    return torch.nn.functional.normalize(states, dim=-1).numpy()


RECORD = Record(
    write=lambda directory: write_checkpoint(directory, CONFIGURATIONS["grouped"]),
    queries=QUERIES,
    documents=DOCUMENTS,
    tokens=64,
    patches=256,
    pixels=(4 * 784, 64 * 784),
    vectors=stock_vectors,
    lora=load_config("configs/7b.py").model.trained,
)
