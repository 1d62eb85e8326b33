"""Encoding of items in order, with a network that sums the tokens of each item."""

import threading
from concurrent.futures import wait
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaembed_jax.batch.items import ArraySpec, Example, Fitted, Layout, Limits
from metaembed_jax.encoding import encoder as module
from metaembed_jax.encoding import schedule
from metaembed_jax.encoding.encoder import Encoder
from metaembed_jax.encoding.reading import Reader, results
from metaembed_jax.errors import UserError
from metaembed_jax.mesh import make_mesh
from metaembed_jax.sharding import named_sharding

LAYOUT = Layout({"patches": ArraySpec((2,), "uint8")}, 1, 4, 4)
CONFIG = SimpleNamespace(
    architecture=SimpleNamespace(layout=LAYOUT), vectors=lambda side: 4, meta_tokens=lambda side, budget: budget
)


class Processor:
    """Texts of digits: a token each; images are (width, height): a patch a pixel."""

    limits = Limits(48, 32, 40, 4, 4)

    def size(self, item, side, *, name):
        if item.get("text") == "bad":
            raise UserError(f"{name}: is bad")
        width, height = item.get("image", (0, 0))
        return Fitted(len(item["text"]), width * height, cut=int(len(item["text"]) == 9), shrunk=False)

    def query(self, item, *, name):
        fitted = self.size(item, "query", name=name)
        tokens = np.array([int(x) for x in item["text"]], np.int32)
        arrays = {"patches": np.full((fitted.patches, 2), len(tokens), np.uint8)} if fitted.patches else {}
        visual = np.full(len(tokens), -1, np.int32)
        return Example(tokens, np.arange(len(tokens))[None], visual, arrays, np.ones(fitted.patches, bool), fitted.cut)

    document = query


class Described(list):
    """A list that knows the sizes of its items, and counts those that are read."""

    def __init__(self, items):
        super().__init__(items)
        self.reads = []

    def describe(self, number):
        return super().__getitem__(number)

    def __getitem__(self, number):
        self.reads.append(number)
        return super().__getitem__(number)


@pytest.fixture(scope="module")
def encoder():
    mesh = make_mesh(4, 2, 1)

    def encode(_, batch):
        segments_BV = jnp.take_along_axis(batch.segments, batch.reads, axis=1)
        is_own_BVS = segments_BV[:, :, None] == batch.segments[:, None]
        sums_BV = jnp.sum(is_own_BVS * batch.tokens[:, None], axis=-1)
        pixels_BV = jnp.zeros_like(sums_BV)
        if batch.patches is not None:
            pixels_BV = jnp.sum((segments_BV[:, :, None] == batch.patch_segments[:, None]) * batch.patches[:, None, :, 0], axis=-1)
        meta_BV = jnp.take_along_axis(batch.meta, batch.reads, axis=1)
        return jnp.stack([sums_BV, pixels_BV, meta_BV], axis=-1).astype(jnp.float32)

    return Encoder(CONFIG, Processor(), mesh, jax.jit(encode, out_shardings=named_sharding(mesh, ("batch", None, None))))


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(schedule, "WINDOW", 16)
    monkeypatch.setattr(schedule, "SMALL", 16)
    monkeypatch.setattr(module, "CHUNK_ITEMS", 5)


def items_of(count, seed=0):
    rng = np.random.default_rng(seed)
    texts = ["".join(map(str, rng.integers(0, 10, rng.integers(1, 20)))) for _ in range(count)]
    return [{"text": text} | ({"image": (4, int(rng.integers(1, 8)))} if rng.random() < 0.7 else {}) for text in texts]


def expected(items, budget):
    def of(item):
        width, height = item.get("image", (0, 0))
        return [[sum(map(int, item["text"])), len(item["text"]) * width * height, vector] for vector in range(budget)]

    return np.array([of(item) for item in items], np.float32).reshape(len(items), budget, 3)


def run(encoder, items, budget=3, size=1000, start=0):
    return list(encoder.blocks({}, items, "query", budget, start=start, size=size))


@pytest.mark.parametrize("count", [1, 7, 900])
@pytest.mark.parametrize("kind", [list, Described])
def test_vectors_come_in_the_order_of_items(encoder, small_windows, count, kind):
    items = items_of(count)
    (block,) = run(encoder, kind(items))
    np.testing.assert_array_equal(block.numbers, np.arange(count))
    np.testing.assert_array_equal(block.vectors, expected(items, 3))
    assert encoder.reduced.items == count and encoder.reduced.cut == sum(len(item["text"]) == 9 for item in items)
    assert len(encoder.programs) <= 6  # of this budget: three with images, two without, one small


def test_blocks_come_in_order(encoder, small_windows):
    items = Described(items_of(900))
    blocks = run(encoder, items, size=70, start=30)
    assert [block.items for block in blocks] == [range(first, min(first + 70, 900)) for first in range(30, 900, 70)]
    np.testing.assert_array_equal(np.concatenate([block.vectors for block in blocks]), expected(items[30:], 3))
    assert sorted(number for number in items.reads if isinstance(number, int)) == list(range(30, 900))  # each is read once


def test_calls_are_taken_ahead():
    taken = []
    calls = (SimpleNamespace(call=SimpleNamespace(size=size), taken=taken.append(size)) for size in (4, 4, 4, 16, 1))
    sent = [(started.call.size, sum(taken)) for started in module._ahead(calls, 8)]
    assert sent == [(4, 12), (4, 28), (4, 28), (16, 29), (1, 29)]


def test_sizes_do_not_wait_for_items():
    may_read = threading.Event()

    class Slow(Processor):
        """A processor that makes items only after `may_read`."""

        def query(self, item, *, name):
            may_read.wait()
            return super().query(item, name=name)

    reader = Reader(Slow(), Described(items_of(100)), "query", 3, 3)
    items, sizes = reader.row_items(range(100)), reader.sizes(range(100))
    unknown = wait(sizes, timeout=20).not_done
    may_read.set()
    assert not unknown and len(results(items)) == 100
    reader.close()


def test_nothing_to_encode(encoder):
    assert run(encoder, []) == [] and run(encoder, ["1"], start=1) == []


def test_a_bad_item_is_named_and_threads_end(encoder, small_windows):
    items = items_of(200)
    items[150] = {"text": "bad"}
    with pytest.raises(UserError, match="item 150: is bad"):
        run(encoder, items)
    with pytest.raises(UserError, match="item 1: expected a text, a PIL image or a dict of both, not int"):
        run(encoder, ["1", 3])
    documents = Described(items)
    documents.item_name = "row {}".format
    with pytest.raises(UserError, match="row 150: is bad"):
        run(encoder, documents)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("encode")]


def test_what_was_cut_is_printed_once(encoder, capsys):
    encoder._printed.clear()
    for _ in range(2):
        run(encoder, ["123456789", "1"])
    assert capsys.readouterr().err.count("query: of 2 items, 1 texts cut to fit a row") == 1
