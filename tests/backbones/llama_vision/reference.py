"""Vectors of transformers for random Llama-3.2-Vision checkpoints, written from the method's description alone."""

import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from metaembed_jax.checkpoints.loading import load
from metaembed_jax.mesh import make_mesh
from metaembed_jax.network import abstract_network
from tests.backbones.qwen2_5_vl.reference import noise
from tests.backbones.references import kept

BEGIN, END, IMAGE = "<|begin_of_text|>", "<|end_of_text|>", "<|image|>"
VOCABULARY = 300  # the image token is one more


def configuration(*, heads, width, layers, crossings, scaled, vision, vision_width, vision_heads, kept, side, patch=14, tiles=4):
    """A config.json. Every size differs from every other, so that no two can be exchanged unseen."""
    rope = dict(rope_type="default", rope_theta=10000.0)
    if scaled:
        rope |= dict(rope_type="llama3", factor=6.0, low_freq_factor=1.5, high_freq_factor=5.0, original_max_position_embeddings=40)
    text = dict(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, intermediate_size=72, rms_norm_eps=1e-4,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], cross_attention_layers=list(crossings), rope_parameters=rope,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    sides = range(1, tiles + 1)
    vision = dict(
        hidden_size=vision_width, num_hidden_layers=vision[0], num_global_layers=vision[1], attention_heads=vision_heads,
        intermediate_size=56, vision_output_dim=vision_width * (1 + len(kept)), image_size=side, patch_size=patch, norm_eps=1e-3,
        intermediate_layers_indices=list(kept), max_num_tiles=tiles,
        supported_aspect_ratios=[[rows, columns] for rows in sides for columns in sides if rows * columns <= tiles],
    )  # fmt: skip
    return dict(text_config=text, vision_config=vision, image_token_index=VOCABULARY, tie_word_embeddings=False)


CONFIGURATIONS = {
    # As released, in small: crossings at a distance, llama3's rope, four tiles; 10 tokens of a tile, filled up to 16.
    "grouped": configuration(heads=(4, 2), width=64, layers=10, crossings=(3, 8), scaled=True, vision=(4, 3), vision_width=48,
                             vision_heads=3, kept=(0, 2), side=42),
    # Crossings side by side, first and last; 17 tokens of a tile, filled up to 24.
    "irregular": configuration(heads=(6, 1), width=96, layers=6, crossings=(0, 2, 3, 5), scaled=False, vision=(3, 2),
                               vision_width=40, vision_heads=2, kept=(0, 1, 2), side=40, patch=10, tiles=3),
    # One layer of a kind; 5 tokens of a tile, filled up to 8.
    "small": configuration(heads=(2, 2), width=32, layers=2, crossings=(1,), scaled=True, vision=(1, 1), vision_width=24,
                           vision_heads=4, kept=(0,), side=28, tiles=6),
}  # fmt: skip

# Of different tilings in every configuration: several rows, several columns, both, and one tile.
TALL, WIDE, LARGE, SMALL = noise(150, 61, 1), noise(50, 160, 2), noise(139, 123, 4), noise(26, 33, 3)
TEXTS = ["a red car", "", "what stands left of the hut", "airplane lock", "cloud snow 漢字"]
QUERIES = [*TEXTS, {"text": "where", "image": TALL}, {"text": "a longer question", "image": WIDE}, {"image": SMALL}]
DOCUMENTS = [*TEXTS[2:], *({"image": image} for image in (TALL, WIDE, SMALL)), {"text": "with its caption", "image": LARGE}, "a"]


@functools.cache
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BEGIN, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["Query: a red car", "Describe the image.", "the cloud question where airplane"] * 5, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    tokenizer.add_special_tokens([IMAGE])
    return tokenizer


def write_checkpoint(directory: Path, configuration: dict) -> None:
    """A directory as `save_pretrained` leaves it. Norms, biases, gates and embeddings are random: at 0 and 1 they hide faults."""
    import torch
    from transformers import MllamaConfig, MllamaForConditionalGeneration
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(directory / "tokenizer.json"))
    model = MllamaForConditionalGeneration(MllamaConfig(**configuration))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "gate" in name and parameter.shape == (1,):
                values = values.sign() * (0.3 + 0.5 * values.abs())
            elif "norm" in name:
                values = 0.4 * values + (0.0 if name.endswith("bias") else 1.0)
            elif parameter.ndim > 1 and ("embed" not in name or "patch_embedding" in name):
                values = values / parameter[0].numel() ** 0.5
            parameter.copy_(values)
    vision = configuration["vision_config"]
    # Several shards with an index, or one file.
    model.save_pretrained(directory, max_shard_size="200KB" if vision["max_num_tiles"] == 4 else "5GB")
    MllamaImageProcessorPil(
        size={"height": vision["image_size"], "width": vision["image_size"]}, max_image_tiles=vision["max_num_tiles"],
        image_mean=[0.4, 0.5, 0.55], image_std=[0.2, 0.3, 0.25],
    ).save_pretrained(directory)  # fmt: skip


class Transformers:
    """A checkpoint in transformers, with rows of Meta Tokens put in by a hook on its embedding layer."""

    def __init__(self, directory: Path):
        from transformers import MllamaForConditionalGeneration, PreTrainedTokenizerFast
        from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

        self.model = MllamaForConditionalGeneration.from_pretrained(directory, dtype="float32").eval()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
        self.images = MllamaImageProcessorPil.from_pretrained(directory)

    def vectors(self, items: list, side: str, meta_tokens: np.ndarray) -> np.ndarray:
        """All rows of both sides behind each item."""
        return by_kind(items, lambda alike: self._batch(alike, side, meta_tokens))

    def _batch(self, items: list, side: str, meta_tokens: np.ndarray) -> np.ndarray:
        import torch

        rows = [self.tokenizer(string(item, side), add_special_tokens=False)["input_ids"] for item in items]
        length, suffix = max(map(len, rows)), len(meta_tokens)
        tokens = torch.zeros(len(rows), length + suffix, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, ids in enumerate(rows):
            tokens[row, length - len(ids) : length] = torch.tensor(ids)
            mask[row, length - len(ids) :] = 1
        seen = looks(see(self.images, items), mask) if isinstance(items[0], dict) else {}
        core, appended = self.model.model, torch.tensor(meta_tokens)
        hook = core.get_input_embeddings().register_forward_hook(
            lambda module, arguments, output: torch.cat([output[:, :length], appended.expand(len(rows), -1, -1)], dim=1)
        )
        with torch.no_grad():
            states = core(input_ids=tokens, attention_mask=mask, use_cache=False, **seen).last_hidden_state
        hook.remove()
        read = states[:, length : length + 16] if side == "query" else states[:, length + 16 :]
        return torch.nn.functional.normalize(read, dim=-1).numpy()


def by_kind(items: list, vectors) -> np.ndarray:
    """Vectors of items with an image and of those without, each kind in a batch: transformers skips layers for the latter alone."""
    by_row = {}
    for kind in (False, True):
        rows = [row for row, item in enumerate(items) if isinstance(item, dict) == kind]
        by_row |= zip(rows, vectors([items[row] for row in rows]), strict=True)
    return np.stack([by_row[row] for row in range(len(items))])


def see(images, items: list) -> dict:
    """The pictures of items, each alone in its row, by an image processor of transformers; `num_tiles` is how many each has."""
    return dict(images([[item["image"]] for item in items], return_tensors="pt"))


def looks(seen: dict, mask) -> dict:
    """Return the model's inputs. Prompts begin with the image token, so all their tokens attend to the image's tiles, and so do the
    Meta Tokens after them; padding does not."""
    counts = np.array(seen.pop("num_tiles"))
    tiles = np.arange(seen["pixel_values"].shape[2]) < counts[:, :, None]
    return seen | {"cross_attention_mask": mask[:, :, None, None] * mask.new_tensor(tiles)[:, None]}


def string(item, side: str) -> str:
    """An item's prompt."""
    prefix, suffix = ("Query: ", END * 10 + "\n") if side == "query" else ("", "")
    if isinstance(item, str):
        return f"{BEGIN}{prefix}{item}{END}{suffix}"
    return f"{IMAGE}{BEGIN}{prefix}{item.get('text', 'Describe the image.')}{END}{suffix}"


def reference(name: str, scratch: Path) -> SimpleNamespace:
    """The directory of a checkpoint, Meta Tokens, and the vectors of QUERIES and DOCUMENTS with them."""
    items = {"query": QUERIES, "document": DOCUMENTS}
    return kept(f"llama_vision/{name}", scratch, CONFIGURATIONS[name], write_checkpoint, Transformers, items)


def read(directory: Path) -> SimpleNamespace:
    """The config, parameters and processor of a checkpoint."""
    config, parameters, processor = load(directory, "float32", make_mesh(devices=jax.devices()[:1]), 0, 1024)
    return SimpleNamespace(config=config, parameters=parameters, processor=processor)


def backbone_of(model: SimpleNamespace) -> nnx.Module:
    """Return the reference with its weights."""
    return nnx.merge(abstract_network(model.config)[0], model.parameters).backbone
