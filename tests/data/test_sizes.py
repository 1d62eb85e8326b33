"""Sizes of items against the examples of the processor, and the tables of prepared sources."""

import pickle

import numpy as np
import pytest
from tokenizers import Tokenizer

from metaembed_jax.backbones.qwen2_5_vl.inputs import Images, Processor
from metaembed_jax.batch.items import Limits
from metaembed_jax.data import sizes
from metaembed_jax.data.sizes import CUT, PATCHES, SHRUNK, TOKENS, SourceSizes
from metaembed_jax.data.sources import preparation, records
from tests.data.varied_pairs import prepare_pairs

LIMITS = Limits(tokens=100, patches=128, text_tokens=60, query_tokens=4, document_tokens=8)
NEGATIVES = 2


class Counting(Processor):
    """Records the items that it sizes."""

    asked = []

    def size(self, item, side, **keywords):
        self.asked.append(item)
        return super().size(item, side, **keywords)


@pytest.fixture(scope="module")
def tokenizer(data_dir):
    return Tokenizer.from_file(str(data_dir / "icons" / "tokenizer.json"))


@pytest.fixture
def processor(tokenizer, monkeypatch):
    monkeypatch.setattr(Counting, "asked", [])
    return processor_with(tokenizer, LIMITS)


def processor_with(tokenizer, limits):
    return Counting(tokenizer, Images(min_pixels=28 * 28, max_pixels=60 * 28 * 28), limits)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare_pairs(tmp_path_factory.mktemp("pairs") / "in")


@pytest.fixture
def source(prepared):
    """The training split; its tables are removed at the end."""
    split = records.open_split(prepared / "mine", preparation.VERSION, "train").with_descriptions()
    yield split
    for file in split.folder.glob("sizes-*"):
        file.unlink()


def sizes_of(processor, record):
    """Return the sizes of the processor's examples of a record."""
    examples = [processor.query(record["query"]), processor.document(record["positive"])]
    examples += [processor.document(item) for item in record["negatives"][:NEGATIVES]]
    sizes = np.zeros((2 + NEGATIVES, 4), np.int32)
    sizes[: len(examples)] = [(len(x.tokens), x.patches, x.cut, x.shrunk) for x in examples]
    return sizes


def test_sizes_are_those_of_the_examples(source, processor):
    expected = np.stack([sizes_of(processor, record) for record in source])
    prepared = SourceSizes(source, processor, NEGATIVES, "mine")
    np.testing.assert_array_equal(prepared.table, expected)
    np.testing.assert_array_equal(prepared.of(7, 3, 4), expected[7])
    same = {"query": {"text": "same"}, "positive": {"text": "same"}, "negatives": [], "source": "x"}
    in_memory = SourceSizes([same, *source], processor, NEGATIVES, "mine")
    assert in_memory.table is None
    np.testing.assert_array_equal(in_memory.of(0, 3, 4), sizes_of(processor, same))
    np.testing.assert_array_equal([in_memory.of(1 + row, 3, 4) for row in range(len(source))], expected)
    assert expected[..., CUT].any() and expected[..., SHRUNK].any() and not expected[..., CUT].all()
    assert expected[..., TOKENS].max() <= 100 - 4 and expected[..., PATCHES].max() <= 128 and expected[:, 2:].min() == 0


def test_boards_are_sized_page_by_page(data_dir, processor):
    from metaembed_jax.data.sources import boards

    pages = boards.Pages(boards.Drawings(data_dir, "train"), 0, ((10, 1, 1), (0, 4, 9)), 112)
    page_sizes = pickle.loads(pickle.dumps(SourceSizes(pages, processor, NEGATIVES, "boards")))
    assert page_sizes.table is None
    for row, epoch, step in ((0, 0, 0), (3, 1, 5), (3, 1, 50)):
        np.testing.assert_array_equal(page_sizes.of(row, epoch, step), sizes_of(processor, pages.compose(row, epoch, step)))


def test_a_table_is_computed_once_for_each_processor(source, processor, tokenizer, monkeypatch):
    first = SourceSizes(source, processor, NEGATIVES, "mine").table
    assert len(processor.asked) > len(source)
    processor.asked.clear()
    np.testing.assert_array_equal(SourceSizes(source, processor, NEGATIVES, "mine").table, first)
    assert processor.asked and all(item in sizes.PROBES for item in processor.asked)

    for changed in (LIMITS._replace(text_tokens=10), LIMITS._replace(tokens=90), LIMITS._replace(patches=64)):
        other = SourceSizes(source, processor_with(tokenizer, changed), NEGATIVES, "mine").table
        assert (other != first).any()
    assert SourceSizes(source, processor, 1, "mine").table.shape == (len(source), 3, 4)
    monkeypatch.setattr(Processor, "_suffix", lambda self, side: [1, 2, 3])  # other code
    assert (SourceSizes(source, processor, NEGATIVES, "mine").table != first).any()
    assert len(list(source.folder.glob("sizes-train-*.npy"))) == 6


def test_a_damaged_table_is_computed_again(source, processor):
    first = SourceSizes(source, processor, NEGATIVES, "mine").table
    (file,) = source.folder.glob("sizes-train-*.npy")
    whole = file.read_bytes()
    for damaged in (b"", b"garbage", b"PK\x03\x04", whole[:60], whole[:-8], whole[:-200] + bytes(200)):
        file.write_bytes(damaged)
        np.testing.assert_array_equal(SourceSizes(source, processor, NEGATIVES, "mine").table, first)
        assert file.read_bytes() == whole


def test_worker_processes_and_folders_that_cannot_be_written(source, processor, monkeypatch, capsys):
    monkeypatch.setattr(sizes.os, "access", lambda *_: False)
    monkeypatch.setattr(sizes, "workers_for", lambda rows: 2)
    monkeypatch.setattr(sizes, "CHUNK_ROWS", 10)

    def map_pickled(job, function, chunks, workers):
        assert workers == 2
        return (pickle.loads(pickle.dumps(function))(pickle.loads(pickle.dumps(job)), chunk) for chunk in chunks)

    monkeypatch.setattr(sizes, "map_with", map_pickled)
    expected = np.stack([sizes_of(processor, record) for record in source])
    np.testing.assert_array_equal(SourceSizes(source, processor, NEGATIVES, "mine").table, expected)
    assert not list(source.folder.glob("sizes-*")) and "cannot be written" in capsys.readouterr().out
