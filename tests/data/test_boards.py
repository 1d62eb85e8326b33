"""The boards source: pages of icons, fixed for testing and composed for training."""

import collections
import io

import numpy as np
import pytest
from PIL import Image

from metaembed_jax.config import DataConfig
from metaembed_jax.data import sources
from metaembed_jax.data.sources import boards, icons, records
from metaembed_jax.errors import UserError


def settings(data_dir, curriculum=(), page_side=224):
    return DataConfig(dir=str(data_dir), curriculum=curriculum, page_side=page_side, sources=(("boards", 1.0, 0),))


def fixed(data_dir, split):
    return [record["query"]["text"].split(", ") for record in records.open_split(data_dir / "boards", boards.VERSION, split)]


@pytest.mark.parametrize("count", range(1, 10))
def test_cells_are_disjoint_and_on_the_page(count):
    for seed in range(50):
        covered = np.zeros((boards.SIDE, boards.SIDE), int)
        cells = boards.cells(count, np.random.default_rng(seed))
        assert len(cells) == count
        for x, y, width, height in cells:
            assert min(x, y) >= 0 and max(x + width, y + height) <= boards.SIDE and min(width, height) >= 56
            covered[y : y + height, x : x + width] += 1
        assert covered.max() == covered.min() == 1


def test_every_icon_of_a_page_is_drawn_whole():
    black = Image.new("L", (icons.SIDE, icons.SIDE), 0)
    for seed in range(50):
        page = np.asarray(boards.compose([black] * 9, np.random.default_rng(seed)))
        assert page.shape == (boards.SIDE, boards.SIDE) and set(np.unique(page)) == {0, 255}
        assert 9 * 42**2 < (page == 0).sum() < 9 * boards.LARGEST**2


@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_drawing_of_the_split_is_on_three_pages_and_no_other(data_dir, split):
    pages = fixed(data_dir, split)
    shown = collections.Counter(name for page in pages for name in page)
    drawings = collections.Counter(
        record["query"]["text"] for record in records.open_split(data_dir / "icons", icons.VERSION, split)
    )
    assert shown == {name: 3 * count for name, count in drawings.items()}
    assert {icons.split_of(name) for name in shown} == {split}
    assert {len(page) for page in pages} <= set(range(4, 10))
    assert all(len(set(page)) == len(page) for page in pages)


def test_pages_that_show_all_names_of_a_query_are_relevant(data_dir):
    task, pages = sources.retrieval("boards", data_dir, "test"), fixed(data_dir, "test")
    asked = [query["text"].split(", ") for query in task.queries]
    assert {len(names) for names in asked} == {1, 2} and len(asked) == len({tuple(names) for names in asked})
    assert {names[0] for names in asked if len(names) == 1} == {name for page in pages for name in page}
    assert len(task.documents) == len(pages)
    for names, relevant in zip(asked, task.relevance, strict=True):
        assert relevant == {number for number, page in enumerate(pages) if set(names) <= set(page)} != set()


def test_fixed_pages_never_move(data_dir, tmp_path, small_fonts):
    again = boards.prepare(tmp_path)
    assert again == boards.prepare(data_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boards, "fixed_pages", lambda *_: pytest.fail("composed again"))
        assert boards.prepare(tmp_path) == again
    assert (tmp_path / "boards" / "tokenizer.json").read_bytes() == (tmp_path / "icons" / "tokenizer.json").read_bytes()


def test_a_preparation_that_fails_leaves_nothing_that_looks_finished(tmp_path, monkeypatch, small_fonts):
    monkeypatch.setattr(boards.shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        boards.prepare(tmp_path)
    with pytest.raises(UserError, match="no complete preparation"):
        sources.retrieval("boards", tmp_path, "test")


def test_training_pages_are_a_pure_function_of_seed_epoch_and_row(data_dir):
    pages, same_pages, others = (boards.training(settings(data_dir), seed) for seed in (0, 0, 1))
    pages.compose(3, 8, 0)  # an earlier call changes nothing

    def same(a, b):
        return a["query"] == b["query"] and a["positive"]["image"].tobytes() == b["positive"]["image"].tobytes()

    page = pages.compose(7, 2, 0)
    assert page["positive"]["image"].size == (boards.SIDE, boards.SIDE)
    assert same(page, same_pages.compose(7, 2, 0))
    assert not any(
        same(page, other) for other in (same_pages.compose(7, 3, 0), same_pages.compose(8, 2, 0), others.compose(7, 2, 0))
    )


def test_a_smaller_page_holds_the_same_icons(data_dir):
    page = boards.training(settings(data_dir, ((0, 1, 1),), page_side=112), 0).compose(7, 2, 0)["positive"]["image"]
    ink = (np.asarray(page) < 128).nonzero()
    assert page.size == (112, 112)
    assert max(np.ptp(ink[0]), np.ptp(ink[1])) > 0.5 * 0.75 * boards.LARGEST


def test_training_pages_hold_training_icons_and_deal_each_once_an_epoch(data_dir, monkeypatch):
    shown = []
    monkeypatch.setattr(boards, "compose", lambda images, random, side: shown.append([id(image) for image in images]))
    pages = boards.training(settings(data_dir), 0)
    names = {id(pages.drawings[row][1]): pages.drawings[row][0] for row in range(len(pages.drawings))}
    for row in range(len(pages)):
        query = pages.compose(row, 0, 0)["query"]["text"].split(", ")
        assert 1 <= len(query) <= 2 and set(query) <= {names[image] for image in shown[-1]}
        assert 4 <= len(shown[-1]) <= 9
    dealt = [image for page in shown for image in page]
    assert len(set(dealt)) == len(dealt)
    assert {icons.split_of(names[image]) for image in dealt} == {"train"}


def test_the_curriculum_sets_how_many_icons_a_page_shows(data_dir, monkeypatch):
    monkeypatch.setattr(boards, "compose", lambda images, random, side: len(images))
    pages = boards.training(settings(data_dir, ((10, 1, 1), (20, 2, 4), (0, 5, 9))), 0)
    for step, expected in (
        (0, {1}),
        (9, {1}),
        (10, {2, 3, 4}),
        (19, {2, 3, 4}),
        (20, set(range(5, 10))),
        (10**6, set(range(5, 10))),
    ):
        records_of_step = [pages.compose(row % len(pages), row // len(pages), step) for row in range(100)]
        assert {record["positive"]["image"] for record in records_of_step} == expected
        named = {record["query"]["text"].count(", ") + 1 for record in records_of_step}
        assert named == ({1} if step < 10 else {1, 2})


@pytest.mark.parametrize(
    "curriculum, clue", [(((5, 0, 3),), "fewest"), (((5, 4, 10),), "most"), (((9, 1, 1), (5, 1, 1), (0, 4, 9)), "rising")]
)
def test_a_curriculum_that_cannot_be_followed_is_an_error(data_dir, curriculum, clue):
    with pytest.raises(UserError, match=f"config.data.curriculum.*{clue}"):
        boards.training(settings(data_dir, curriculum), 0)


def test_pages_on_disk_are_readable(data_dir):
    for document in sources.retrieval("boards", data_dir, "validation").documents:
        assert Image.open(io.BytesIO(document["image"])).size == (boards.SIDE, boards.SIDE)
