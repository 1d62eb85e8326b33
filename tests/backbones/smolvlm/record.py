"""SmolVLM in the tests of all families."""

from metaembed_jax.config import load_config
from tests.backbones.families import Record
from tests.backbones.smolvlm.reference import CONFIGURATIONS, DOCUMENTS, QUERIES, process, stock_processor, write_checkpoint


def stock_vectors(directory, items, side, model=None):
    """Return the vectors of an export without a head, or of another `model` with its tokenizer."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(directory).eval() if model is None else model
    suffix = "".join(f"<|meta_query_{number}|>" for number in range(16))
    suffix += "".join(f"<|meta_document_{number}|>" for number in range(64)) if side == "document" else ""
    with torch.no_grad():
        states = model(**process(stock_processor(directory, model.config), items, side, suffix)).last_hidden_state
    return torch.nn.functional.normalize(states[:, -(16 if side == "query" else 64) :], dim=-1).numpy()


RECORD = Record(
    write=lambda directory: write_checkpoint(directory, CONFIGURATIONS["marked"]),
    queries=QUERIES,
    documents=DOCUMENTS,
    tokens=64,
    patches=5 * 36,
    pixels=(1, 48 * 48),
    vectors=stock_vectors,
    lora=load_config("configs/smolvlm_256m.py").model.trained,
)
