"""A byte-level BPE vocabulary for models trained from scratch, with a family's special tokens."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from metaembed_jax.backbones.family import Family
from metaembed_jax.files import write_bytes
from metaembed_jax.inputs.texts import QUERY


def train(texts: Iterable[str], path: str | Path, family: Family, vocabulary: int = 2048) -> Tokenizer:
    """Learn at most `vocabulary` tokens from texts, and write them to `path` (a tokenizer.json), atomically.

    Texts have the prefix of queries, so that their first words begin with a space, as all others do. All 256 bytes and the special
    tokens are tokens, so any string can be encoded.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(family.special_tokens),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    corpus = [QUERY + text for text in texts]
    # The words of the prompts are in every input, so they count as often as the texts.
    tokenizer.train_from_iterator(corpus + list(family.prompt_words) * len(corpus), trainer)
    write_bytes(Path(path), tokenizer.to_str(pretty=True).encode())
    return tokenizer
