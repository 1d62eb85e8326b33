"""Vectors of transformers for random checkpoints of a Qwen-VL family, written from the method's description alone."""

import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.backbones.references import kept

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
VOCABULARY = 320


def configuration(*, heads, sections, width, layers, depth, full, tied, window=112, eps=1e-6, vision_width=32, vision_heads=2):
    """A config.json. Every size differs from every other, so that no two can be exchanged unseen."""
    text = dict(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, intermediate_size=72, rms_norm_eps=eps,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], max_position_embeddings=4096, initializer_range=0.3,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=list(sections)),
    )  # fmt: skip
    vision = dict(
        depth=depth, hidden_size=vision_width, num_heads=vision_heads, intermediate_size=56, out_hidden_size=width,
        fullatt_block_indexes=list(full), window_size=window,
    )  # fmt: skip
    return dict(model_type="qwen2_5_vl", text_config=text, vision_config=vision, tie_word_embeddings=tied)


CONFIGURATIONS = {
    "grouped": configuration(heads=(4, 2), sections=(2, 3, 3), width=64, layers=3, depth=5, full=(1, 4), tied=False),
    "one_key_head": configuration(heads=(6, 1), sections=(3, 2, 3), width=96, layers=5, depth=3, full=(0, 2), tied=True, eps=1e-5),
    "small_windows": configuration(
        heads=(4, 2),
        sections=(1, 2, 1),
        width=32,
        layers=1,
        depth=5,
        full=(2, 3),
        tied=True,
        window=56,
        vision_width=48,
        vision_heads=3,
    ),
}


def noise(height, width, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# 5x7 and 3x9 units: several windows, ragged at the right and the bottom, in one batch; 3x2 units: less than a window.
TALL, WIDE, SMALL = noise(140, 199, 1), noise(80, 250, 2), noise(84, 56, 3)
TEXTS = ["a red car", "", "what stands left of the hut", "airplane lock", "cloud snow 漢字"]
QUERIES = [*TEXTS, {"text": "where", "image": TALL}, {"text": "a longer question", "image": WIDE}, {"image": SMALL}]
DOCUMENTS = [*TEXTS[1:], {"image": TALL}, {"image": WIDE}, {"text": "with a caption of its own", "image": WIDE}, {"image": SMALL}]


@functools.cache
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["user\nQuery: a red car", "Describe the image.", "the cloud question"] * 5, trainer)
    return tokenizer


def write_tokenizer(directory: Path) -> None:
    tokenizer().save(str(directory / "tokenizer.json"))


def write_checkpoint(directory: Path, configuration: dict) -> None:
    """A directory as `save_pretrained` leaves it. Norms and biases are random too: at ones and zeros they hide faults."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory)
    ids = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(
            **configuration,
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
        )
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                values = 0.4 * values + (0.0 if name.endswith("bias") else 1.0)
            elif "embed_tokens" not in name and "pos_embed" not in name:
                values = values / parameter[0].numel() ** 0.5
            parameter.copy_(values)
    # Several shards with an index, or one file.
    model.save_pretrained(directory, max_shard_size="5GB" if configuration["tie_word_embeddings"] else "200KB")
    mean, std = [0.4, 0.5, 0.55], [0.2, 0.3, 0.25]
    patch = model.config.vision_config.patch_size
    size = {"shortest_edge": 4 * (2 * patch) ** 2, "longest_edge": 64 * (2 * patch) ** 2}
    Qwen2VLImageProcessorPil(size=size, patch_size=patch, image_mean=mean, image_std=std).save_pretrained(directory)


class Transformers:
    """A checkpoint in transformers, with rows of Meta Tokens put in by a hook on its embedding layer."""

    def __init__(self, directory: Path):
        from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.model = AutoModelForImageTextToText.from_pretrained(directory, dtype="float32").eval()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
        self.images = Qwen2VLImageProcessorPil.from_pretrained(directory)

    def vectors(self, items: list, side: str, meta_tokens: np.ndarray) -> np.ndarray:
        """All items as one left-padded batch, with all rows of both sides behind each."""
        import torch

        pictures = [item["image"] for item in items if isinstance(item, dict)]
        seen = self.images(pictures, return_tensors="pt")
        counts = iter((seen["image_grid_thw"].prod(-1) // 4).tolist())
        rows = [self.tokenizer(string(item, side, counts), add_special_tokens=False)["input_ids"] for item in items]
        length, suffix = max(map(len, rows)), len(meta_tokens)
        tokens = torch.zeros(len(rows), length + suffix, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, ids in enumerate(rows):
            tokens[row, length - len(ids) : length] = torch.tensor(ids)
            mask[row, length - len(ids) :] = 1

        core, appended = self.model.model, torch.tensor(meta_tokens)
        kinds = (tokens == self.model.config.image_token_id).int()
        positions, _ = core.get_rope_index(tokens, kinds, seen["image_grid_thw"], attention_mask=mask)
        hook = core.get_input_embeddings().register_forward_hook(
            lambda module, arguments, output: torch.cat([output[:, :length], appended.expand(len(rows), -1, -1)], dim=1)
        )
        with torch.no_grad():
            states = core(input_ids=tokens, attention_mask=mask, position_ids=positions, **seen).last_hidden_state
        hook.remove()
        read = states[:, length : length + 16] if side == "query" else states[:, length + 16 :]
        return torch.nn.functional.normalize(read, dim=-1).numpy()


def string(item, side: str, counts) -> str:
    """An item's prompt; `counts` gives the visual tokens of the next image."""
    prefix, suffix = ("Query: ", "<|endoftext|>" * 10 + "\n") if side == "query" else ("", "")
    if isinstance(item, str):
        return f"<|im_start|>user\n{prefix}{item}<|im_end|><|endoftext|>{suffix}"
    visual = f"<|vision_start|>{'<|image_pad|>' * next(counts)}<|vision_end|>"
    return f"<|im_start|>user\n{visual}{prefix}{item.get('text', 'Describe the image.')}<|im_end|><|endoftext|>{suffix}"


def reference(name: str, scratch: Path, configurations: dict = CONFIGURATIONS) -> SimpleNamespace:
    """The directory of a checkpoint, Meta Tokens, and the vectors of QUERIES and DOCUMENTS with them."""
    configuration = configurations[name]
    name = f"{configuration['model_type']}/{name}"
    return kept(name, scratch, configuration, write_checkpoint, Transformers, {"query": QUERIES, "document": DOCUMENTS})
