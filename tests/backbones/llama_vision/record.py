"""Llama-3.2-Vision in the tests of all families."""

from metaembed_jax.config import load_config
from tests.backbones.families import Record
from tests.backbones.llama_vision.reference import (
    CONFIGURATIONS,
    DOCUMENTS,
    QUERIES,
    by_kind,
    looks,
    see,
    string,
    write_checkpoint,
)


def stock_vectors(directory, items, side, model=None):
    """Return the vectors of an export, or of another `model` with its tokenizer.

    Items with an image and those without are in batches of their own, as transformers can compute them.
    """
    import torch
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(directory).eval() if model is None else model
    tokenizer = AutoTokenizer.from_pretrained(directory)
    images = AutoImageProcessor.from_pretrained(directory, backend="pil")
    suffix = "".join(f"<|meta_query_{number}|>" for number in range(16))
    suffix += "".join(f"<|meta_document_{number}|>" for number in range(64)) if side == "document" else ""

    def vectors(items):
        prompts = [string(item, side) + suffix for item in items]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        seen = looks(see(images, items), batch["attention_mask"]) if isinstance(items[0], dict) else {}
        with torch.no_grad():
            states = model(**batch, **seen, use_cache=False).last_hidden_state
        return torch.nn.functional.normalize(states[:, -(16 if side == "query" else 64) :], dim=-1).numpy()

    return by_kind(items, vectors)


RECORD = Record(
    write=lambda directory: write_checkpoint(directory, CONFIGURATIONS["irregular"]),
    queries=QUERIES,
    documents=DOCUMENTS,
    tokens=64,
    patches=3 * 16,
    pixels=(1, 1),  # which say nothing here
    vectors=stock_vectors,
    lora=load_config("configs/llama_vision_11b.py").model.trained,
)
