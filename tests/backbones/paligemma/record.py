"""PaliGemma in the tests of all families: the second, which has all that the first has but the names of some norms."""

from metaembed_jax.config import load_config
from tests.backbones.families import Record
from tests.backbones.paligemma.reference import CONFIGURATIONS, DOCUMENTS, QUERIES, string, write_checkpoint


def stock_vectors(directory, items, side, model=None):
    """Return the vectors of an export without a head, or of another `model` with its tokenizer."""
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    model = AutoModel.from_pretrained(directory).eval() if model is None else model
    tokenizer = AutoTokenizer.from_pretrained(directory)
    seen = SiglipImageProcessorPil.from_pretrained(directory)(
        [item["image"] for item in items if isinstance(item, dict)], return_tensors="pt"
    )
    rows = 16 if side == "query" else 80
    suffix = "".join(f"<|meta_query_{number}|>" for number in range(16))
    suffix += "".join(f"<|meta_document_{number}|>" for number in range(rows - 16))
    visual = model.config.text_config.num_image_tokens
    prompts = [string(item, side, visual) + suffix for item in items]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    batch["token_type_ids"][:, -rows:] = 1
    with torch.no_grad():
        states = model(**batch, **seen).last_hidden_state[:, -(16 if side == "query" else 64) :]
    return torch.nn.functional.normalize(states, dim=-1).numpy()


RECORD = Record(
    write=lambda directory: write_checkpoint(directory, CONFIGURATIONS["gemma2"]),
    queries=QUERIES,
    documents=DOCUMENTS,
    tokens=96,
    patches=25,
    pixels=(1, 1),  # in which this family has no say
    vectors=stock_vectors,
    lora=load_config("configs/paligemma_3b.py").model.trained,
)
