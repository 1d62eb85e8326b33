"""A byte-level BPE vocabulary for models trained from scratch, with a family's special tokens; the names of Meta Tokens."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from metaembed_jax.backbones.family import Family
from metaembed_jax.files import write_bytes
from metaembed_jax.inputs.texts import QUERY


def meta_token_names(query_tokens: int, document_tokens: int) -> list[str]:
    """The strings that Meta Tokens have in the vocabulary of an export, query rows first."""
    sides = (("query", query_tokens), ("document", document_tokens))
    return [f"<|meta_{side}_{number}|>" for side, count in sides for number in range(count)]


def train(texts: Iterable[str], path: str | Path, family: Family, vocabulary: int = 2048) -> Tokenizer:
    """Learns at most `vocabulary` tokens from `texts` and writes them to `path` (a tokenizer.json), atomically.

    Each text is seen as it stands in the query prompt, after its prefix, so its first word carries a space as its others do. The
    256 bytes and the special tokens are among the tokens, so any string can be encoded.
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
