"""Vectors of transformers for random SmolVLM checkpoints, from the chat strings of the prompts."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.backbones.qwen2_5_vl.reference import noise
from tests.backbones.references import kept

START, PAD, END, FRAME, IMAGE = "<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>"
NEEDED = [START, PAD, END, FRAME, IMAGE]
MARKERS = ["<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))]
VOCABULARY = 340
MEAN, STD = [0.4, 0.5, 0.55], [0.2, 0.3, 0.25]


def configuration(*, heads, width, layers, vision, depth, tile, patch, scale, edge, marked, eps=1e-5, theta=10000.0):
    """A config.json, and next to it how images are scaled and whether the vocabulary has markers. Every size differs from every
    other, so that no two can be exchanged unseen."""
    text = dict(
        model_type="llama", vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, intermediate_size=72,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], rms_norm_eps=eps, pad_token_id=1,
        rope_parameters=dict(rope_type="default", rope_theta=theta),
    )  # fmt: skip
    vision = dict(
        hidden_size=vision[0], num_attention_heads=vision[1], num_hidden_layers=depth, intermediate_size=44, image_size=tile,
        patch_size=patch, layer_norm_eps=10 * eps,
    )  # fmt: skip
    return dict(text_config=text, vision_config=vision, scale_factor=scale, longest_edge=edge, marked=marked)


CONFIGURATIONS = {
    # As released, in small: markers that are tokens, 4 tokens of a tile.
    "marked": configuration(heads=(4, 2), width=48, layers=3, vision=(30, 3), depth=2, tile=24, patch=4, scale=3, edge=48,
                            marked=True),
    # As SmolVLM-Instruct: patches leave pixels of a tile over, markers are spelled; a longest edge of no whole tiles.
    "spelled": configuration(heads=(6, 6), width=60, layers=2, vision=(28, 2), depth=3, tile=26, patch=6, scale=2, edge=50,
                             marked=False, theta=500.0),
}  # fmt: skip

# Two rows of tiles, two columns, both; few sizes, which are few programs to compile.
TALL, WIDE, SMALL, LARGE, SQUARE = noise(150, 61, 1), noise(50, 160, 2), noise(13, 33, 3), noise(139, 123, 4), noise(90, 90, 5)
TEXTS = ["a red car", "", "left of the hut", "airplane", "cloud 漢字"]
QUERIES = [*TEXTS, {"text": "where", "image": LARGE}, {"text": "which", "image": SQUARE}, {"image": LARGE}]
DOCUMENTS = [*TEXTS[1:], *({"image": image} for image in (TALL, WIDE, SMALL)), {"text": "snow", "image": TALL}]


def write_tokenizer(directory: Path, marked: bool) -> None:
    """Its merges join line ends, as the released one's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = NEEDED + MARKERS if marked else NEEDED
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["<row_1_col_1>", "Describe the image.", "User: Query: a red car", "\n\n"] * 5, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))


def write_checkpoint(directory: Path, configuration: dict) -> None:
    """A directory as `save_pretrained` leaves it. Norms and biases are random too: at ones and zeros they hide faults."""
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    directory.mkdir(parents=True, exist_ok=True)
    configuration = dict(configuration)
    edge, marked = configuration.pop("longest_edge"), configuration.pop("marked")
    write_tokenizer(directory, marked)
    model = Idefics3ForConditionalGeneration(
        Idefics3Config(**configuration, image_token_id=NEEDED.index(IMAGE), tie_word_embeddings=not marked)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                values = 0.4 * values + (0.0 if name.endswith("bias") else 1.0)
            elif "embed_tokens" not in name and "position_embedding" not in name:
                values = values / parameter[0].numel() ** 0.5
            parameter.copy_(values)
    # Several shards with an index, or one file.
    model.save_pretrained(directory, max_shard_size="100KB" if marked else "5GB")
    tile = {"longest_edge": configuration["vision_config"]["image_size"]}
    images = Idefics3ImageProcessorPil(size={"longest_edge": edge}, max_image_size=tile, image_mean=MEAN, image_std=STD)
    images.save_pretrained(directory)


def stock_processor(directory: Path, config):
    """transformers' processor of a checkpoint, which takes images and strings with <image>; `config` is transformers' own."""
    from transformers import Idefics3Processor, PreTrainedTokenizerFast
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), pad_token=PAD, padding_side="left")
    vision = config.vision_config
    units = (vision.image_size // vision.patch_size // config.scale_factor) ** 2
    return Idefics3Processor(Idefics3ImageProcessorPil.from_pretrained(directory), tokenizer, image_seq_len=units)


def process(processor, items: list, side: str, suffix: str = "") -> dict:
    """Return the model's inputs for items, as one left-padded batch; `suffix` follows each prompt."""
    images = [[item["image"]] if isinstance(item, dict) else [] for item in items]
    strings = [string(item, side) + suffix for item in items]
    how = dict(padding=True, add_special_tokens=False, return_tensors="pt")
    return processor(text=strings, images=images if any(images) else None, **how)


class Transformers:
    """A checkpoint in transformers, with rows of Meta Tokens put in by a hook on its embedding layer."""

    def __init__(self, directory: Path):
        from transformers import Idefics3ForConditionalGeneration

        self.model = Idefics3ForConditionalGeneration.from_pretrained(directory, dtype="float32").eval()
        self.processor = stock_processor(directory, self.model.config)

    def vectors(self, items: list, side: str, meta_tokens: np.ndarray) -> np.ndarray:
        """All items as one left-padded batch, with all rows of both sides behind each. Positions are those it counts itself."""
        import torch

        seen, rows = process(self.processor, items, side), len(meta_tokens)
        length, core, appended = seen["input_ids"].shape[1], self.model.model, torch.tensor(meta_tokens)
        more = {"input_ids": 0, "attention_mask": 1}
        seen |= {key: torch.nn.functional.pad(seen[key], (0, rows), value=value) for key, value in more.items()}
        hook = core.get_input_embeddings().register_forward_hook(
            lambda module, arguments, output: torch.cat([output[:, :length], appended.expand(len(items), -1, -1)], dim=1)
        )
        with torch.no_grad():
            states = core(**seen, use_cache=False).last_hidden_state
        hook.remove()
        read = states[:, length : length + 16] if side == "query" else states[:, length + 16 :]
        return torch.nn.functional.normalize(read, dim=-1).numpy()


def string(item, side: str) -> str:
    """An item's prompt, with one <image> for an image."""
    prefix, suffix = ("Query: ", END * 10 + "\n") if side == "query" else ("", "")
    if isinstance(item, str):
        return f"{START}User: {prefix}{item}{END}{suffix}"
    return f"{START}User:{IMAGE}{prefix}{item.get('text') or 'Describe the image.'}{END}{suffix}"


def reference(name: str, scratch: Path) -> SimpleNamespace:
    """The directory of a checkpoint, Meta Tokens, and the vectors of QUERIES and DOCUMENTS with them."""
    items = {"query": QUERIES, "document": DOCUMENTS}
    return kept(f"smolvlm/{name}", scratch, CONFIGURATIONS[name], write_checkpoint, Transformers, items)
