"""Training batches: their items and positions; batch n is a pure function of (config, n)."""

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
from PIL import Image

from metaembed_jax.backbones.qwen2_5_vl import FAMILY as QWEN2_5_VL
from metaembed_jax.batch.packing import pack
from metaembed_jax.config import load_config, with_keys
from metaembed_jax.data import sources, tokenizer
from metaembed_jax.data.pipeline import iterate, training_batches
from metaembed_jax.data.row_plan import plan_rows
from metaembed_jax.data.run_items import run_items
from metaembed_jax.data.sources import icons
from metaembed_jax.data.sources.descriptions import describe
from metaembed_jax.data.stored_plan import NAME, stored_plan
from metaembed_jax.errors import UserError
from metaembed_jax.network_config import model_config, row_limits
from metaembed_jax.training.step import digests_of_pairs

WORDS = [f"word{number}" for number in range(200)]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return tokenizer.train(WORDS, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json", QWEN2_5_VL, vocabulary=700)


@pytest.fixture(scope="module")
def processor(learned):
    return processor_of(learned, config())


def processor_of(learned, settings):
    return QWEN2_5_VL.Processor(learned, QWEN2_5_VL.Images(28 * 28, 224 * 224), row_limits(settings))


def config(batch=8, row=(288, 128), names=(("a", 1.0, 0),), negatives=0, seed=0, steps=12, **data):
    changes = {"seed": seed, "rows.batch_size": batch, "rows.size": row, "schedule.steps": steps, "optimizer.warmup_steps": 0}
    data = {"sources": names, "negatives": negatives, "sub_batch": 0, "page_side": 224, **data}
    return with_keys(load_config("configs/7b.py"), changes | {f"data.{key}": value for key, value in data.items()})


def plan_of(settings, processor, sources):
    items = run_items(settings, processor, sources)
    return items, plan_rows(items, row_limits(settings))


def dataset_of(settings, processor, sources, here=None, most=0, shards=1):
    items, plan = plan_of(settings, processor, sources)
    return training_batches(items, plan.shape(most, shards), model_config(settings).architecture.layout, here)


def png(number, height=56, width=84):
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def record(number, source="a", positive=None, negatives=()):
    positive = {"image": png(number)} if positive is None else positive
    return {"query": {"text": WORDS[number]}, "positive": positive, "negatives": list(negatives), "source": source}


class Watched:
    """A source that records which rows are read."""

    def __init__(self, records):
        self.records, self.asked, self.lock = records, [], threading.Lock()

    def __len__(self):
        return len(self.records)

    def compose(self, row, epoch, step):
        with self.lock:
            self.asked.append((step, epoch, row))
        return self.records[row]

    def describe(self, row, epoch, step):
        return describe(self.records[row], f"row {row}")


def items_in_order(batch):
    """Return the tokens and the sum of the pixels of every query and document, by the positions of their vectors."""
    rows, items = batch.rows.map(lambda x: x.reshape(-1, *x.shape[2:])), []
    for start, count in [(start, 16) for start in batch.queries] + [(start, 64) for start in batch.documents]:
        row, first = divmod(int(start), rows.reads.shape[1])
        reads = rows.reads[row, first : first + count]
        is_item = rows.segments[row] == rows.segments[row, reads[0]]
        assert (np.diff(reads) == 1).all() and np.flatnonzero(is_item)[-1] == reads[-1]
        assert (rows.meta[row, is_item] >= 0).sum() == {16: 16, 64: 80}[count]
        pixels = rows.patches[row, rows.patch_segments[row] == rows.segments[row, reads[0]]] if rows.patches is not None else []
        items.append((tuple(rows.tokens[row, is_item & (rows.meta[row] < 0)].tolist()), int(np.sum(pixels, dtype=int))))
    return items[: len(batch.queries)], items[len(batch.queries) :]


def expected(items, encode):
    """Return the same of items that are encoded one by one."""
    examples = [encode(item) for item in items]
    return [(tuple(x.tokens.tolist()), int(x.patch_arrays.get("patches", np.zeros(1)).astype(int).sum())) for x in examples]


def equal(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_batch_n_is_a_pure_function_of_config_and_n(processor):
    records = [record(number) for number in range(30)]
    dataset, same = (dataset_of(config(), processor, [records]) for _ in range(2))
    dataset[7]  # an earlier step changes nothing
    for step in (0, 3, 4, 11):
        assert equal(dataset[step], same[step])
    assert not equal(dataset[3], dataset[4])
    assert not equal(dataset[3], dataset_of(config(seed=1), processor, [records])[3])


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
    records[3] = record(3, positive={"image": png(3)[:200]})
    with pytest.raises(UserError, match="source 'a', row 3, positive: the image cannot be read"):
        list(iterate(dataset_of(config(), processor, [records]), 0, 2, workers=1))
    batches = iterate(dataset_of(config(steps=100), processor, [[record(number) for number in range(8)]]), 0, 100, workers=1)
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
    epochs = [[row for _, epoch, row in source.asked if epoch == number] for number in range(4)]
    assert all(sorted(rows) == list(range(10)) for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 4
    assert [step for step, _, _ in source.asked] == list(np.repeat(range(10), 4))


def test_sources_are_mixed_by_weight_in_sub_batches_of_one_source(processor):
    first, second = Watched([record(number) for number in range(7)]), Watched([record(100 + number, "b") for number in range(5)])
    dataset = dataset_of(config(batch=8, sub_batch=2, names=(("a", 3.0, 0), ("b", 1.0, 0))), processor, [first, second])
    names = {tuple(processor.query({"text": word}).tokens.tolist()): int(word[4:]) >= 100 for word in WORDS}
    for step in range(5):
        batch = dataset[step]
        of_b = np.array([names[tokens] for tokens, _ in items_in_order(batch)[0]])
        assert (of_b == batch.source).all() and (of_b[::2] == of_b[1::2]).all() and of_b.sum() == 2
    assert len(first.asked) == 30 and len(second.asked) == 10


def test_a_cap_leaves_the_same_rows_in_every_epoch(processor):
    source = Watched([record(number) for number in range(20)])
    dataset = dataset_of(config(batch=4, names=(("a", 1.0, 12),)), processor, [source])
    for step in range(6):
        dataset[step]
    first, second = ([row for _, epoch, row in source.asked if epoch == number] for number in range(2))
    assert len(set(first)) == 12 and sorted(first) == sorted(second) and first != second


def test_queries_and_positives_are_in_pair_order_then_negatives_pair_by_pair(processor):
    """A row has the same items and number with any microbatches; empty rows come last."""
    records = [
        record(number, negatives=[{"text": WORDS[number + 50]}, {"image": png(number + 50)}, {"text": "unused"}])
        for number in range(12)
    ]
    source = Watched(records)
    whole = dataset_of(config(negatives=2), processor, [source])[0]
    drawn = [records[row] for _, _, row in source.asked]
    documents = [pair["positive"] for pair in drawn] + [item for pair in drawn for item in pair["negatives"][:2]]
    queries = expected([pair["query"] for pair in drawn], processor.query)
    assert items_in_order(whole) == (queries, expected(documents, processor.document))
    assert whole.negative_mask.shape == (8, 2) and whole.negative_mask.all()
    rows = whole.rows.row.size
    batch = dataset_of(config(negatives=2), processor, [records], most=5, shards=2)[0]
    assert batch.rows.tokens.shape[:2] == (-(-rows // 4), 4)
    flat = batch.rows.map(lambda x: x.reshape(-1, *x.shape[2:])[:rows])
    assert equal(flat, whole.rows.map(lambda x: x[0])) and not batch.rows.segments.reshape(-1, 288)[rows:].any()
    assert equal((batch.queries, batch.documents), (whole.queries, whole.documents))


def test_rows_hold_every_step_and_their_use_is_known(processor):
    """Documents of many sizes; every third query and every fifth image exceed the limits."""
    sizes = [(56, 56), (140, 84), (28, 56), (112, 168), (300, 300)]
    records = [record(number, positive={"image": png(number, *sizes[number % 5])}) for number in range(30)]
    for number in range(0, 30, 3):
        records[number]["query"]["text"] = " ".join(WORDS)
    settings = config(max_text_tokens=40)
    items, plan = plan_of(settings, processor_of(processor._tokenizer._tokenizer, settings), [records])
    shape, packed = plan.shape(0, 1), [pack(items[step].sizes_N3, plan.row) for step in range(12)]
    assert plan.rows == shape.rows == max(slots_N2[:, 0].max() for slots_N2 in packed) + 1
    dataset = training_batches(items, shape, model_config(settings).architecture.layout)
    for step in (0, 5):
        rows, figures = dataset[step].rows, items[step].figures(shape)
        assert figures["fill/tokens"] == pytest.approx((rows.segments > 0).mean(), rel=1e-6)
        assert figures["cut"] == pytest.approx(sum(row % 3 == 0 for _, _, row in items[step].references) / 16)
        assert figures["shrunk"] == pytest.approx(sum(row % 5 == 4 for _, _, row in items[step].references) / 8)
        assert rows.patches.shape[-2] == 128 and figures["fill/patches"] >= (rows.patch_segments > 0).mean()
    mean = np.mean([items[step].figures(shape)["fill/tokens"] for step in range(12)])
    assert plan.figures(shape)["rows/fill/tokens"] == pytest.approx(mean)
    line = plan.describe(shape)
    assert line.startswith(f"rows: {plan.rows} of 288 tokens and 128 patches a step, {100 * mean:.0f} % of tokens and ")
    assert (
        f"{100 * plan.cut:.3g} % of texts are cut, {100 * plan.shrunk:.3g} % of images shrunk" in line
        and plan.cut > 0 < plan.shrunk
    )


def test_a_plan_is_read_from_the_folder_of_its_run_and_made_again_where_it_does_not_fit(processor, tmp_path, monkeypatch):
    from metaembed_jax.data import stored_plan as module

    planned = []
    monkeypatch.setattr(module, "plan_rows", lambda *arguments: planned.append(1) or plan_rows(*arguments))
    settings, source = config(), [record(number) for number in range(20)]
    items, plan = plan_of(settings, processor, [source])
    assert stored_plan(items, settings, tmp_path) == stored_plan(items, settings, tmp_path) == plan
    assert len(planned) == 1
    settings = with_keys(settings, {"schedule.log_every": settings.schedule.log_every + 1})
    stored_plan(items, settings, tmp_path)
    assert len(planned) == 1
    for damaged in (b"{", b"[]", (tmp_path / NAME).read_bytes().replace(b"longest", b"x")):
        (tmp_path / NAME).write_bytes(damaged)
        planned.clear()
        assert stored_plan(items, settings, tmp_path) == stored_plan(items, settings, tmp_path) == plan
        assert len(planned) == 1
    planned.clear()
    settings = with_keys(settings, {"seed": 1})
    stored_plan(plan_of(settings, processor, [source])[0], settings, tmp_path)
    settings = with_keys(settings, {"schedule.steps": settings.schedule.steps + 1})
    stored_plan(plan_of(settings, processor, [source])[0], settings, tmp_path)
    source[0] = record(0, positive={"image": png(0, 112, 112)})
    stored_plan(plan_of(settings, processor, [source])[0], settings, tmp_path)
    assert len(planned) == 3


def test_rows_without_any_image_have_no_patches(processor):
    records = [record(number, positive={"text": WORDS[number]}) for number in range(8)]
    _, plan = plan_of(config(), processor, [records])
    assert plan.row.patches == 0 and "patches" not in plan.describe(plan.shape(0, 1))
    assert dataset_of(config(), processor, [records])[0].rows.patches is None


def test_two_hosts_make_the_rows_of_the_batch_and_read_only_their_records(processor):
    records = [record(number, positive={"text": WORDS[number]} if number % 3 else None) for number in range(20)]
    watched = [Watched(records) for _ in range(3)]
    hosts = (None, np.array([0, 2]), np.array([1, 3]))
    whole, *shares = (
        dataset_of(config(), processor, [source], here, most=4)[2] for source, here in zip(watched, hosts, strict=True)
    )
    joined = jax.tree.map(lambda x, y: np.stack([x, y], axis=2).reshape(x.shape[0], -1, *x.shape[2:]), *(x.rows for x in shares))
    assert equal(joined, whole.rows)
    digests = np.stack([share.digests for share in shares], axis=2).reshape(whole.digests.shape)
    assert equal(digests, whole.digests) and (digests != 0).any()
    for share in shares:
        assert all(equal(getattr(share, key), getattr(whole, key)) for key in ("queries", "documents", "negative_mask", "source"))
    pairs = [row for _, _, row in watched[0].asked]
    rows_B2 = np.stack([whole.queries, whole.documents], axis=1) // whole.rows.reads.shape[-1] % 4
    for source, here in zip(watched[1:], hosts[1:], strict=True):
        own = [row for row, rows in zip(pairs, rows_B2, strict=True) if np.isin(rows, here).any()]
        assert [row for _, _, row in source.asked] == own and len(own) < len(pairs)


@pytest.mark.parametrize("broken", [b"not an image", png(3)[:200]])
def test_an_unreadable_image_is_named_by_source_and_row(processor, broken):
    """An image whose size can be read fails when it is decoded, all others before the first step."""
    records = [record(number) for number in range(8)]
    records[3] = record(3, positive={"image": broken})
    with pytest.raises(UserError, match="source 'pages', row 3, positive: the image cannot be read"):
        next(iterate(dataset_of(config(names=(("pages", 1.0, 0),)), processor, [records]), 0, 1))


def test_an_image_of_another_size_than_was_described_is_named(processor):
    source = Watched([record(number) for number in range(8)])
    dataset, descriptions = dataset_of(config(), processor, [source]), [source.describe(row, 0, 0) for row in range(8)]
    source.describe = lambda row, *_: descriptions[row]
    source.records[5] = record(5, positive={"image": png(5, 28, 28)})
    with pytest.raises(UserError, match="source 'a', row 5, positive: .*; expected .* prepare that again"):
        dataset[0]


def test_items_of_the_same_content_have_the_same_words(processor):
    """Rows 0 and 4 share a query, 1 and 5 a positive, and the negative of 2 is the positive of 3."""
    records = [record(number) for number in range(8)]
    records[4] = record(4) | {"query": records[0]["query"]}
    records[5] = record(5, positive=records[1]["positive"])
    records[2] = record(2, negatives=[records[3]["positive"]])
    source = Watched(records)
    batch = dataset_of(config(negatives=1), processor, [source])[0]
    drawn = [row for _, _, row in source.asked]
    digests = digests_of_pairs(batch)
    queries, positives = ({row: tuple(words.tolist()) for row, words in zip(drawn, x, strict=True)} for x in digests[:2])
    assert queries[0] == queries[4] and len(set(queries.values())) == 7
    assert positives[1] == positives[5] and len(set(positives.values())) == 7
    negatives = {row: tuple(words.tolist()) for row, words in zip(drawn, digests.negatives[:, 0], strict=True)}
    assert negatives[2] == positives[3] and negatives[3] == positives[3]


def test_missing_negatives_are_masked_and_take_no_tokens(processor):
    records = [record(number, negatives=[{"text": WORDS[number + 50]}] * (number % 3)) for number in range(8)]
    source = Watched(records)
    batch = dataset_of(config(negatives=2), processor, [source])[0]
    drawn = [row for _, _, row in source.asked]
    np.testing.assert_array_equal(batch.negative_mask, [[number < row % 3 for number in range(2)] for row in drawn])
    assert (np.diff(batch.rows.segments, prepend=0) > 0).sum() == 16 + batch.negative_mask.sum()
    positives, negatives = batch.documents[:8], batch.documents[8:].reshape(8, 2)
    assert (negatives == positives[:, None]).tolist() == (~batch.negative_mask).tolist()


def test_sub_batches_are_of_one_source_and_say_which(processor):
    sources = [[record(number) for number in range(start, start + 24)] for start in (0, 24)]
    mixed = config(batch=16, names=(("a", 1.0, 0), ("b", 3.0, 0)), sub_batch=4)
    dataset = dataset_of(mixed, processor, sources)
    drawn = np.concatenate([dataset[step].source for step in range(8)])
    assert (drawn.reshape(-1, 4) == drawn[::4, None]).all()
    assert np.bincount(drawn).tolist() == [32, 96]
    with pytest.raises(UserError, match="config.rows.batch_size=16: expected a multiple of config.data.sub_batch=5"):
        dataset_of(config(batch=16, sub_batch=5), processor, sources[:1])


def test_too_few_pairs_are_refused(processor):
    with pytest.raises(UserError, match="source 'a' has no training records"):
        dataset_of(config(), processor, [[]])
    with pytest.raises(UserError, match="source 'a' has 7 training pairs; expected at least config.rows.batch_size=8"):
        dataset_of(config(), processor, [[record(number) for number in range(7)]])
    with pytest.raises(UserError, match="source 'a' uses 3 training pairs; expected at least config.data.sub_batch=4"):
        dataset_of(config(sub_batch=4, names=(("a", 1.0, 3),)), processor, [[record(number) for number in range(7)]])
    with pytest.raises(UserError, match="config.data.sources\\[0\\]=\\('a', 0, 0\\): expected"):
        dataset_of(config(names=(("a", 0, 0),)), processor, [[record(0)]])


def test_a_row_that_holds_no_item_is_refused(processor):
    with pytest.raises(UserError, match=r"config.rows.size=\(80, 64\): 80 of its tokens are Meta Tokens; expected more"):
        row_limits(config(row=(80, 64)))
    with pytest.raises(UserError, match=r"config.rows.size=\(288, 96\): expected a multiple of 64 patches"):
        row_limits(config(row=(288, 96)))
    with pytest.raises(UserError, match=r"config.rows.microbatch_rows=3: expected at least data x fsdp = 4"):
        dataset_of(config(), processor, [[record(number) for number in range(8)]], most=3, shards=4)


def test_the_curriculum_follows_the_step(processor, data_dir):
    settings = config(batch=4, row=(288, 256), names=(("boards", 1.0, 0),), dir=str(data_dir), curriculum=((2, 1, 1), (0, 2, 9)))
    larger = processor_of(processor._tokenizer._tokenizer, settings)
    dataset = dataset_of(settings, larger, sources.training_records(settings.data, settings.seed))

    def asked(step):
        queries, _ = items_in_order(dataset[step])
        return [processor._tokenizer._tokenizer.decode(list(tokens)).count(", ") for tokens, _ in queries]

    assert sum(asked(0) + asked(1)) == 0 < sum(asked(2) + asked(3) + asked(4))
    assert equal(dataset[7], dataset_of(settings, larger, sources.training_records(settings.data, settings.seed))[7])


def test_icons_train_with_and_without_augmentation(processor, data_dir):
    def dataset_with(augment):
        settings = config(names=(("icons", 1.0, 0),), dir=str(data_dir), augment=augment, steps=140)
        records = sources.training_records(settings.data, settings.seed)
        return dataset_of(settings, processor, records), len(records[0])

    (plain, count), (varied, _) = dataset_with(augment=False), dataset_with(augment=True)
    later = -(-icons.PLAIN_EPOCHS * count // 8)
    assert equal(plain[1], varied[1])
    assert equal(plain[later].rows.tokens, varied[later].rows.tokens)
    assert not equal(plain[later].rows.patches, varied[later].rows.patches)
    assert equal(varied[later], varied[later])
