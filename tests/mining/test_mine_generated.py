"""Mined icons and boards: no negative shows what its query names, and the tasks of other splits are theirs."""

import io

import numpy as np
import pytest
from PIL import Image

from metaembed_jax.data import sources
from metaembed_jax.data.sources import boards, preparation, records
from metaembed_jax.encoding.blocks import EncodedBlock
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.stages import as_stages
from metaembed_jax.mining.mine import Mining, mine
from metaembed_jax.mining.selection import Selection
from tests.retrieval.fake_model import WIDTH, FakeModel, content, vectors

STAGES = as_stages((1, 2), Budget(4, 4, WIDTH))


class ItemModel(FakeModel):
    """A model of texts and images without a network."""

    def encode_blocks(self, items, side, *, budget, size=None, start=0, bar=None, allow_failures=False):
        size = size or max(len(items), 1)
        for first in range(start, len(items), size):
            numbers = range(first, min(first + size, len(items)))
            array = np.array([vectors(content(items[number]))[:budget] for number in numbers], np.float32)
            yield EncodedBlock(numbers, np.array(numbers), array.reshape(-1, budget, WIDTH), {})


@pytest.fixture
def data(tmp_path, data_dir):
    """A folder with the prepared icons and boards, and room for mined sources."""
    for name in ("icons", "boards"):
        (tmp_path / name).symlink_to(data_dir / name)
    return tmp_path


def mined(data, source, out):
    selection = Selection(negatives=3, range_max=60, relative_margin=0.0)
    mine(Mining(source=source, out=out, data_dir=data, selection=selection, stages=STAGES, model="x", step=None), ItemModel())
    return list(records.open_split(data / out, preparation.VERSION, "train"))


def check_tasks(data, source, out):
    """The tasks of validation and test are those of the source, which trains with the same vocabulary."""
    for split in records.HELD_OUT_SPLITS:
        before, after = sources.retrieval(source, data, split), sources.retrieval(out, data, split)
        assert after == before and sources.held_out_sizes(out, data, split) is None
    assert sources.with_pairs([out], data, "test") == [out] and sources.generated_task(out, data) == source
    assert (data / out / "tokenizer.json").read_bytes() == (data / source / "tokenizer.json").read_bytes()


def test_no_negative_of_an_icon_has_its_name(data):
    pairs = mined(data, "icons", "mined")
    names = {}
    for record in pairs:
        names.setdefault(record["positive"]["image"], set()).add(record["query"]["text"])
    negatives = [(record["query"]["text"], item["image"]) for record in pairs for item in record["negatives"]]
    assert len(negatives) > 3 and not any(name in names[image] for name, image in negatives)
    assert pairs[0]["positive"] == sources.fixed_training("icons", data)[0]["positive"]
    check_tasks(data, "icons", "mined")
    again = mined(data, "mined", "again")  # a mined source can be mined
    assert [record["negatives"] for record in again] == [record["negatives"] for record in pairs]
    check_tasks(data, "icons", "again")


def test_no_negative_of_a_page_shows_all_names_of_its_query(data, monkeypatch):
    monkeypatch.setattr(boards, "FIXED_EPOCHS", 2)
    pages = sources.fixed_training("boards", data)
    shown = {
        pages[row]["positive"]["image"]: set(pages.pages.names(row % len(pages.pages), row // len(pages.pages), 0))
        for row in range(len(pages))
    }
    assert len(pages) == 2 * len(pages.pages) == len(shown)
    pairs = mined(data, "boards", "mined")
    asked = [
        (set(record["query"]["text"].split(boards.SEPARATOR)), item["image"]) for record in pairs for item in record["negatives"]
    ]
    assert len(asked) > 3 and not any(names <= shown[image] for names, image in asked)
    assert all(set(record["query"]["text"].split(boards.SEPARATOR)) <= shown[record["positive"]["image"]] for record in pairs)
    check_tasks(data, "boards", "mined")


def test_fixed_pages_are_those_of_training_and_know_who_answers(data):
    pages, (training,) = (
        sources.fixed_training("boards", data),
        sources.training_records(sources.DataConfig(dir=str(data), sources=(("boards", 1.0, 0),)), 0),
    )
    per_epoch = len(training)
    for row in (0, per_epoch - 1, per_epoch, 3 * per_epoch + 2):
        record, composed = pages[row], training.compose(row % per_epoch, row // per_epoch, 0)
        assert record["query"] == composed["query"] and np.array_equal(
            np.asarray(Image.open(io.BytesIO(record["positive"]["image"]))), np.asarray(composed["positive"]["image"])
        )
        assert pages.describe(row)["query"] == record["query"] and pages.describe(row)["positive"]["image"] == (224, 224)
        answering = pages.answering(record["query"])
        assert row in answering
        names = set(record["query"]["text"].split(boards.SEPARATOR))
        assert answering == {n for n in range(len(pages)) if names <= set(training.names(n % per_epoch, n // per_epoch, 0))}
    with pytest.raises(IndexError):
        pages[len(pages)]
