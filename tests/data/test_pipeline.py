"""Training batches: which items are in them, where, and that batch n depends on nothing but (config, n)."""

import io
import multiprocessing
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image

from metaembed_jax.backbones import qwen2_5_vl
from metaembed_jax.config import load_config, model_config
from metaembed_jax.data import sources, tokenizer
from metaembed_jax.data.pipeline import iterate, training_batches
from metaembed_jax.data.slots import padding, place
from metaembed_jax.data.sources import icons
from metaembed_jax.errors import UserError

WORDS = [f"word{number}" for number in range(200)]


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    learned = tokenizer.train(WORDS, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json", qwen2_5_vl, vocabulary=700)
    return qwen2_5_vl.Processor(learned, qwen2_5_vl.Images(28 * 28, 224 * 224))


def config(batch=8, microbatch=None, shapes=((64, 64),), names=(("a", 1.0, 0),), negatives=0, seed=0, **data):
    data = {
        "sources": names,
        "negatives": negatives,
        "query_shapes": ((48, 0),),
        "candidate_shapes": shapes,
        "curriculum": (),
        "sub_batch": 0,
        "page_side": 224,
        "augment": False,
        **data,
    }
    return ConfigDict({"seed": seed, "steps": 200, "batch_size": batch, "microbatch_size": microbatch or batch, "data": data})


def dataset_of(settings, processor, sources, rows=None):
    architecture = model_config(load_config("configs/7b.py", {})).architecture
    return training_batches(settings, architecture, processor, sources, rows)


def png(number, height=56, width=84):
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def record(number, source="a", positive=None, negatives=()):
    positive = {"image": png(number)} if positive is None else positive
    return {"query": {"text": WORDS[number]}, "positive": positive, "negatives": list(negatives), "source": source}


class Watched:
    """A source that notes what it is asked for."""

    def __init__(self, records):
        self.records, self.asked, self.lock = records, [], threading.Lock()

    def __len__(self):
        return len(self.records)

    def compose(self, row, epoch, step):
        with self.lock:
            self.asked.append((step, epoch, row))
        return self.records[row]


def rows_in_order(side):
    """Every item's arrays in pair order, unpadded tokens and the sum of its patches."""
    rows = []
    for group in side["groups"]:
        flat = {key: value.reshape(-1, *value.shape[2:]) for key, value in group.items()}
        for row in range(len(flat["tokens"])):
            pixels = int(flat["patches"][row].astype(int).sum()) if "patches" in flat else 0
            rows.append((tuple(flat["tokens"][row][flat["mask"][row]].tolist()), pixels))
    return [rows[row] for row in side["order"].tolist()]


def expected(items, encode):
    """What `rows_in_order` must give for these items."""
    found = []
    for item in items:
        example = encode(item)
        found.append((tuple(example.tokens.tolist()), int(example.patch_arrays.get("patches", np.zeros(1)).astype(int).sum())))
    return found


def equal(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_batch_n_is_a_pure_function_of_config_and_n(processor):
    records = [record(number) for number in range(30)]
    one, two = (dataset_of(config(), processor, [records]) for _ in range(2))
    one[17]  # whatever was asked before
    for step in (0, 3, 4, 11):
        assert equal(one[step], two[step])
    assert not equal(one[3], one[4])
    assert not equal(one[3], dataset_of(config(seed=1), processor, [records])[3])


@pytest.mark.parametrize("workers", [0, 2])
def test_iterating_from_any_step_gives_the_same_batches(processor, workers):
    dataset = dataset_of(config(), processor, [[record(number) for number in range(30)]])
    step = 5
    for batch in iterate(dataset, 5, 12, workers):
        assert equal(batch, dataset[step])
        step += 1
    assert step == 12


def test_an_error_in_a_worker_and_a_worker_that_is_killed_are_named(processor):
    records = [record(number) for number in range(8)]
    records[3] = record(3, positive={"image": b"broken"})
    with pytest.raises(UserError, match="source 'a', row 3, positive: the image cannot be read"):
        list(iterate(dataset_of(config(), processor, [records]), 0, 2, workers=1))
    batches = iterate(dataset_of(config(), processor, [[record(number) for number in range(8)]]), 0, 200, workers=1)
    next(batches)
    for worker in multiprocessing.active_children():
        worker.kill()
    with pytest.raises(UserError, match="config.data.workers=1 processes that make batches was ended from outside"):
        list(batches)


PARENT = """
import sys
from metaembed_jax.data.pipeline import iterate
import grain, multiprocessing
if __name__ == "__main__":
    batches = iterate(grain.MapDataset.range(10**9), 0, 10**9, workers=2)
    next(batches), next(batches)
    print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
    sys.stdin.read()
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, tmp_path / "parent.py"], **pipes) as parent:
        workers = [int(number) for number in parent.stdout.readline().split()]
        parent.kill()
    assert len(workers) == 2
    until = time.monotonic() + 30
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < until, "a worker outlives its parent"
        time.sleep(0.05)


def test_every_epoch_has_every_row_once_in_an_order_of_its_own(processor):
    source = Watched([record(number) for number in range(10)])
    dataset = dataset_of(config(batch=4), processor, [source])
    for step in range(10):  # 40 draws: 4 epochs
        dataset[step]
    epochs = [[row for _, epoch, row in source.asked if epoch == wanted] for wanted in range(4)]
    assert all(sorted(rows) == list(range(10)) for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 4
    assert [step for step, _, _ in source.asked] == list(np.repeat(range(10), 4))


def test_sources_are_mixed_by_weight_in_sub_batches_of_one_source(processor):
    three, one = Watched([record(number) for number in range(7)]), Watched([record(100 + number, "b") for number in range(5)])
    dataset = dataset_of(config(batch=8, sub_batch=2, names=(("a", 3.0, 0), ("b", 1.0, 0))), processor, [three, one])
    names = {tuple(processor.query({"text": word}).tokens.tolist()): int(word[4:]) >= 100 for word in WORDS}
    for step in range(5):
        of_b = np.array([names[tokens] for tokens, _ in rows_in_order(dataset[step]["query"])]).reshape(4, 2)
        assert (of_b[:, 0] == of_b[:, 1]).all() and of_b.sum() == 2
    assert len(three.asked) == 30 and len(one.asked) == 10


def test_patches_that_are_no_whole_windows_are_refused(processor):
    with pytest.raises(UserError, match="candidate_shapes: 96 patches are no multiple of 64"):
        dataset_of(config(shapes=((64, 96),)), processor, [[record(0)]])


def test_a_cap_leaves_the_same_rows_in_every_epoch(processor):
    source = Watched([record(number) for number in range(20)])
    dataset = dataset_of(config(batch=4, names=(("a", 1.0, 12),)), processor, [source])
    for step in range(6):
        dataset[step]
    first, second = ([row for _, epoch, row in source.asked if epoch == wanted] for wanted in range(2))
    assert len(set(first)) == 12 and sorted(first) == sorted(second) and first != second


def test_queries_and_positives_are_in_pair_order_then_negatives_pair_by_pair(processor):
    records = [
        record(number, negatives=[{"text": WORDS[number + 50]}, {"image": png(number + 50)}, {"text": "unused"}])
        for number in range(12)
    ]
    source = Watched(records)
    batch = dataset_of(config(batch=8, microbatch=4, negatives=2), processor, [source])[0]
    drawn = [records[row] for _, _, row in source.asked]
    assert batch["query"]["groups"][0]["tokens"].shape == (2, 4, 48)
    assert batch["candidate"]["groups"][0]["patches"].shape == (6, 4, 64, 588)
    assert rows_in_order(batch["query"]) == expected([one["query"] for one in drawn], processor.query)
    items = [one["positive"] for one in drawn] + [item for one in drawn for item in one["negatives"][:2]]
    assert rows_in_order(batch["candidate"]) == expected(items, processor.candidate)


def test_items_go_to_the_smallest_shape_class_that_fits(processor):
    sizes = [(56, 56), (140, 84), (28, 56), (112, 168)]
    records = [
        record(number, positive={"image": png(number, *sizes[number % 4])} if number % 5 else {"text": WORDS[number]})
        for number in range(16)
    ]
    shapes = ((24, 0), (28, 64), (64, 128))
    source = Watched(records)
    dataset = dataset_of(config(batch=8, microbatch=4, shapes=shapes), processor, [source])
    for step in range(4):
        side = dataset[step]["candidate"]
        drawn = [records[row]["positive"] for at, _, row in source.asked if at == step]
        assert rows_in_order(side) == expected(drawn, processor.candidate)
        assert [group["tokens"].shape for group in side["groups"]] == [(2, 4, 24), (2, 4, 28), (2, 4, 64)]
        wanted = [0 if "text" in item else 1 if max(Image.open(io.BytesIO(item["image"])).size) <= 112 else 2 for item in drawn]
        assert (side["order"] // 8).tolist() == wanted
        empty = padding({"query": {"groups": ()}, "candidate": side})
        assert empty["padding/candidate/24:0/tokens"] == 1 - side["groups"][0]["mask"].sum() / (8 * 24)
        assert empty["padding/candidate/64:128/patches"] == 1 - side["groups"][2]["patch_mask"].sum() / (8 * 128)
        for group in side["groups"]:  # rows that no item takes have a token to attend to, and no patch
            assert group["mask"].any(-1).all()


def test_a_full_class_passes_items_on_to_a_larger_one_and_no_place_at_all_is_named(processor):
    records = [record(number, positive={"text": WORDS[number]}) for number in range(8)]
    side = dataset_of(config(shapes=((24, 0, 0.5), (64, 64, 0.5)), microbatch=4), processor, [records])[0]["candidate"]
    assert np.bincount(side["order"] // 4).tolist() == [4, 4]
    pictures = [record(number) for number in range(8)]
    with pytest.raises(UserError, match=r"source 'a', row \d, positive: \d+ tokens and 64 patches find no place"):
        dataset_of(config(shapes=((24, 0, 0.5), (64, 64, 0.5)), microbatch=4), processor, [pictures])[0]
    with pytest.raises(UserError, match=r"source 'a', row \d, positive: .* and 64 patches find no place"):
        dataset_of(config(shapes=((64, 0),)), processor, [pictures])[0]
    with pytest.raises(UserError, match=r"on average it has 8.0 items in candidate_shapes, for 4 rows"):
        dataset_of(config(shapes=((64, 64, 0.5),), microbatch=4), processor, [pictures])
    with pytest.raises(UserError, match="candidate_shapes: the share 0.0 of a class must be above 0"):
        dataset_of(config(shapes=((24, 0, 0.0), (64, 64))), processor, [pictures])
    with pytest.raises(UserError, match="query_shapes: 8 items are no whole microbatches of config.microbatch_size=6"):
        dataset_of(config(microbatch=6), processor, [pictures])


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 12), min_size=3, max_size=3))
def test_nested_classes_place_all_items_whenever_it_is_possible(smallest, room):
    """Item i fits class smallest[i] and all larger ones; all find a place if the larger classes hold the larger items (Hall)."""
    room = [*room, 6]
    fits = np.array([[number >= first for number in range(4)] for first in smallest], bool).reshape(-1, 4)
    places = place(fits, room)
    possible = all(sum(first >= number for first in smallest) <= sum(room[number:]) for number in range(4))
    assert (places >= 0).all() == possible
    placed = [tuple(pair) for pair in places.tolist() if pair[0] >= 0]
    assert len(set(placed)) == len(placed)
    for item, (shape, row) in enumerate(places.tolist()):
        assert shape < 0 or (fits[item, shape] and row < room[shape])


@pytest.mark.parametrize("shapes", [((64, 64),), ((24, 0), (64, 64))])
def test_the_parts_of_two_hosts_make_the_whole_batch(processor, shapes):
    records = [record(number, positive={"text": WORDS[number]} if number % 3 else None) for number in range(20)]
    settings = config(batch=8, microbatch=4, shapes=shapes)
    places = (None, np.array([0, 2]), np.array([1, 3]))
    whole, *parts = (dataset_of(settings, processor, [records], rows)[2] for rows in places)
    for side in ("query", "candidate"):
        assert all(np.array_equal(whole[side]["order"], part[side]["order"]) for part in parts)
        pairs = parts[0][side]["groups"], parts[1][side]["groups"]
        joined = jax.tree.map(lambda x, y: np.stack([x, y], axis=2).reshape(x.shape[0], -1, *x.shape[2:]), *pairs)
        assert equal(joined, whole[side]["groups"])


def test_too_long_a_text_is_cut_but_never_image_or_prompt(processor):
    records = [
        {
            "query": {"text": " ".join(WORDS)},
            "positive": {"text": " ".join(WORDS), "image": png(number)},
            "negatives": [],
            "source": "a",
        }
        for number in range(8)
    ]
    batch = dataset_of(config(shapes=((30, 64),)), processor, [records])[0]
    queries, candidates = batch["query"]["groups"][0], batch["candidate"]["groups"][0]
    assert (queries["mask"].sum(-1) > 40).all()
    assert ((candidates["visual_index"] >= 0).sum(-1) == 6).all()
    assert (candidates["tokens"][..., -1] == 0).all()  # <|endoftext|>


@pytest.mark.parametrize("broken", [b"not an image", png(3)[:200]])
def test_an_unreadable_image_is_named_by_source_and_row(processor, broken):
    records = [record(number) for number in range(8)]
    records[3] = record(3, positive={"image": broken})
    dataset = dataset_of(config(names=(("pages", 1.0, 0),)), processor, [records])
    with pytest.raises(UserError, match="source 'pages', row 3, positive: the image cannot be read"):
        dataset[0]
    with pytest.raises(UserError, match="source 'pages', row 3, positive: the image cannot be read"):
        next(iterate(dataset, 0, 1))


@pytest.mark.parametrize("shapes", [((64, 64),), ((48, 0), (64, 64))], ids=["one class", "two classes"])
def test_lacking_hard_negatives_are_masked_and_take_no_row(processor, shapes):
    records = [record(number, negatives=[{"text": WORDS[number + 50]}] * (number % 3)) for number in range(8)]
    source = Watched(records)
    batch = dataset_of(config(negatives=2, shapes=shapes), processor, [source])[0]
    drawn = [row for _, _, row in source.asked]
    np.testing.assert_array_equal(batch["negative_mask"], [[place < row % 3 for place in range(2)] for row in drawn])
    rows = sum(int((group["mask"].sum(axis=-1) > 1).sum()) for group in batch["candidate"]["groups"])
    assert rows == 8 + batch["negative_mask"].sum()
    assert batch["candidate"]["order"].shape == (24,) and batch["candidate"]["order"].min() >= 0


def test_a_batch_is_the_same_whatever_the_microbatch(processor):
    """The items, their order, and the class that each one is in: five texts find three rows of their class, and two go on."""
    texts = [record(number, positive={"text": WORDS[number]}) for number in range(24)]
    pictures = [record(100 + number) for number in range(24)]
    settings = dict(names=(("a", 5.0, 0), ("b", 3.0, 0)), sub_batch=1, shapes=((24, 0, 3 / 8), (64, 64, 5 / 8)))

    def placed(microbatch, step):
        side = dataset_of(config(microbatch=microbatch, **settings), processor, [texts, pictures])[step]["candidate"]
        sizes = [group["item"].size for group in side["groups"]]
        item = np.concatenate([group["item"].ravel() for group in side["groups"]])
        np.testing.assert_array_equal(item[side["order"]], np.arange(8))
        return rows_in_order(side), np.searchsorted(np.cumsum(sizes), side["order"], side="right").tolist()

    for step in range(3):
        whole = placed(8, step)
        assert np.bincount(whole[1]).tolist() == [3, 5]
        assert all(placed(microbatch, step) == whole for microbatch in (1, 2, 4))


def test_sub_batches_are_of_one_source_and_say_which(processor):
    sources = [[record(number) for number in range(start, start + 24)] for start in (0, 24)]
    mixed = config(batch=16, microbatch=8, names=(("a", 1.0, 0), ("b", 3.0, 0)), sub_batch=4)
    dataset = dataset_of(mixed, processor, sources)
    drawn = np.concatenate([dataset[step]["source"] for step in range(8)])
    assert (drawn.reshape(-1, 4) == drawn[::4, None]).all()
    assert np.bincount(drawn).tolist() == [32, 96]
    with pytest.raises(UserError, match="config.batch_size=16 must be a multiple of config.data.sub_batch=5"):
        dataset_of(config(batch=16, sub_batch=5), processor, sources[:1])


def test_an_empty_source_is_named(processor):
    with pytest.raises(UserError, match="source 'a' has no training records"):
        dataset_of(config(), processor, [[]])
    with pytest.raises(UserError, match="config.data.sources: the weight of 'a' is 0"):
        dataset_of(config(names=(("a", 0, 0),)), processor, [[record(0)]])


def test_the_curriculum_follows_the_step(processor, data_dir):
    curriculum = ((2, 1, 1), (0, 2, 9))
    settings = config(batch=4, shapes=((96, 256),), names=(("boards", 1.0, 0),), dir=str(data_dir), curriculum=curriculum)
    dataset = dataset_of(settings, processor, sources.training_records(settings))

    def asked(step):
        return [
            processor._tokenizer._tokenizer.decode(list(tokens)).count(", ") for tokens, _ in rows_in_order(dataset[step]["query"])
        ]

    assert sum(asked(0) + asked(1)) == 0 < sum(asked(2) + asked(3) + asked(4))
    assert equal(dataset[7], dataset_of(settings, processor, sources.training_records(settings))[7])


def test_icons_train_with_and_without_augmentation(processor, data_dir):
    plain, varied = (
        dataset_of(settings, processor, sources.training_records(settings))
        for settings in (config(names=(("icons", 1.0, 0),), dir=str(data_dir), augment=augment) for augment in (False, True))
    )
    later = -(-icons.PLAIN_EPOCHS * len(sources.training_records(config(names=(("icons", 1.0, 0),), dir=str(data_dir)))[0]) // 8)
    assert equal(plain[1], varied[1])
    assert equal(plain[later]["query"], varied[later]["query"])
    assert not equal(plain[later]["candidate"], varied[later]["candidate"])
    assert equal(varied[later], varied[later])
