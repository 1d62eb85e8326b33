"""Vectors of transformers for random PaliGemma checkpoints, written from the method's description alone."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.backbones.qwen2_5_vl.reference import DOCUMENTS, QUERIES
from tests.backbones.references import kept

SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<image>"]
VOCABULARY = 320


def configuration(*, kind, heads, head, width, layers, depth, side, patch, vision=(32, 2), eps=1e-6, theta=10000.0, **gemma2):
    """A config.json. Every size differs from every other, so that no two can be exchanged unseen."""
    text = dict(
        model_type=kind, vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, intermediate_size=72, head_dim=head,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], rms_norm_eps=eps, max_position_embeddings=4096,
        rope_parameters=dict(rope_type="default", rope_theta=theta), **gemma2,
    )  # fmt: skip
    vision = dict(
        model_type="siglip_vision_model", hidden_size=vision[0], num_hidden_layers=depth, num_attention_heads=vision[1],
        intermediate_size=54, image_size=side, patch_size=patch, layer_norm_eps=eps, vision_use_head=False,
    )  # fmt: skip
    return dict(text_config=text, vision_config=vision, projection_dim=width, hidden_size=width)


# Sequences of the second and third are longer than their windows: by far, and by little. Caps are in the midst of the scores.
CONFIGURATIONS = {
    "gemma": configuration(kind="gemma", heads=(4, 1), head=18, width=48, layers=3, depth=4, side=56, patch=14),
    "gemma2": configuration(
        kind="gemma2", heads=(6, 2), head=14, width=60, layers=5, depth=3, side=50, patch=10, vision=(36, 3), eps=1e-5,
        query_pre_attn_scalar=20, attn_logit_softcapping=1.5, sliding_window=24,
    ),
    "one_key_head": configuration(
        kind="gemma2", heads=(2, 1), head=22, width=52, layers=4, depth=2, side=42, patch=7, theta=500.0,
        query_pre_attn_scalar=9, attn_logit_softcapping=2.5, sliding_window=90,
    ),
}  # fmt: skip


def write_tokenizer(directory: Path) -> None:
    """Its merges cross from words to spaces and line ends, as Gemma's may."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["Query: a red car\n", "Describe the image.\n", "the cloud question\n"] * 5, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))


def write_checkpoint(directory: Path, configuration: dict) -> None:
    """A directory as `save_pretrained` leaves it. Norms and biases are random too: at ones and zeros they hide faults."""
    import torch
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory)
    model = PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(**configuration, image_token_index=SPECIAL_TOKENS.index("<image>"), vocab_size=VOCABULARY)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                starts_at_one = "vision_tower" in name and name.endswith("weight")
                values = 0.4 * values + (1.0 if starts_at_one else 0.0)
            elif "embed_tokens" in name:
                values = 0.2 * values
            elif "position_embedding" not in name:
                values = values / parameter[0].numel() ** 0.5
            parameter.copy_(values)
    # Several shards with an index, or one file.
    model.save_pretrained(directory, max_shard_size="100KB" if configuration["text_config"]["model_type"] == "gemma" else "5GB")
    side, mean, std = configuration["vision_config"]["image_size"], [0.4, 0.5, 0.55], [0.2, 0.3, 0.25]
    processor = SiglipImageProcessorPil(size={"height": side, "width": side}, image_mean=mean, image_std=std)
    processor.save_pretrained(directory)


class Transformers:
    """A checkpoint in transformers, with Meta Tokens as further rows of its vocabulary."""

    def __init__(self, directory: Path):
        from transformers import PaliGemmaForConditionalGeneration, PreTrainedTokenizerFast
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        self.model = PaliGemmaForConditionalGeneration.from_pretrained(directory, dtype="float32").eval()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
        self.images = SiglipImageProcessorPil.from_pretrained(directory)

    def vectors(self, items: list, side: str, meta_tokens: np.ndarray) -> np.ndarray:
        """All items as one left-padded batch, with all rows of both sides behind each. Positions are those it counts itself."""
        import torch

        core = self.model.model
        seen = self.images([item["image"] for item in items if isinstance(item, dict)], return_tensors="pt")
        visual = (core.config.vision_config.image_size // core.config.vision_config.patch_size) ** 2
        rows = [self.tokenizer(string(item, side, visual), add_special_tokens=False)["input_ids"] for item in items]
        length, suffix = max(map(len, rows)), len(meta_tokens)
        tokens = torch.zeros(len(rows), length + suffix, dtype=torch.long)
        tokens[:, length:] = VOCABULARY + torch.arange(suffix)
        mask, kinds = torch.zeros_like(tokens), torch.zeros_like(tokens)
        kinds[:, length:] = 1
        for row, ids in enumerate(rows):
            tokens[row, length - len(ids) : length] = torch.tensor(ids)
            mask[row, length - len(ids) :] = 1

        table = core.get_input_embeddings()
        table.weight = torch.nn.Parameter(torch.cat([table.weight[:VOCABULARY], torch.tensor(meta_tokens)]))
        with torch.no_grad():
            states = core(input_ids=tokens, attention_mask=mask, token_type_ids=kinds, **seen).last_hidden_state
        read = states[:, length : length + 16] if side == "query" else states[:, length + 16 :]
        return torch.nn.functional.normalize(read, dim=-1).numpy()


def string(item, side: str, visual: int) -> str:
    """An item's prompt; `visual` is the number of visual tokens of an image."""
    prefix, end = ("Query: ", "<pad>" * 10 + "\n") if side == "query" else ("", "\n")
    if isinstance(item, str):
        return f"<bos>{prefix}{item}{end}"
    return f"{'<image>' * visual}<bos>{prefix}{item.get('text', 'Describe the image.')}{end}"


def reference(name: str, scratch: Path) -> SimpleNamespace:
    """The directory of a checkpoint, Meta Tokens, and the vectors of QUERIES and DOCUMENTS with them."""
    items = {"query": QUERIES, "document": DOCUMENTS}
    return kept(f"paligemma/{name}", scratch, CONFIGURATIONS[name], write_checkpoint, Transformers, items, scale=0.2)
