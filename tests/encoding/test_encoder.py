"""Encoding of items in order, with a network that sums the tokens of each item."""

import contextlib
import io
import json
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, wait
from types import SimpleNamespace

import numpy as np
import pytest
from tqdm import tqdm

from metaembed_jax.encoding import encoder as module
from metaembed_jax.encoding import schedule
from metaembed_jax.encoding.memory import SharedMemory
from metaembed_jax.encoding.reading import Reader
from metaembed_jax.errors import UserError
from metaembed_jax.mesh import make_mesh
from tests.encoding.digits import Processor, digit_encoder, expected, items_of
from tests.several_hosts import Hosts


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
    return digit_encoder(make_mesh(4, 2, 1))


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(schedule, "WINDOW", 16)
    monkeypatch.setattr(schedule, "SMALL", 16)
    monkeypatch.setattr(module, "CHUNK_ITEMS", 5)


def run(encoder, items, budget=3, size=1000, start=0, **options):
    return list(encoder.blocks({}, items, "query", budget, start=start, size=size, **options))


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
    items = [reader.row_item(number, Processor().size(item, "query", name="")[:2]) for number, item in enumerate(items_of(100))]
    sizes = reader.sizes(range(100))
    unknown = wait(sizes, timeout=20).not_done
    may_read.set()
    assert not unknown and all(item.result() for item in items)
    reader.close()


def test_threads_share_the_memory_of_an_image():
    memory, held, most = SharedMemory(100), [], []

    def hold(size):
        with memory.hold(size):
            held.append(min(size, 100))
            most.append(sum(held))
            time.sleep(0.001)  # so that threads meet here
            held.remove(min(size, 100))

    sizes = np.random.default_rng(0).integers(1, 150, 300).tolist()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(hold, sizes))
    assert len(most) == 300 and max(most) <= 100
    with ThreadPoolExecutor(2) as threads:
        with memory.hold(60):
            assert threads.submit(hold, 40).result(timeout=60) is None
            waiting = threads.submit(hold, 41)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.2)
        assert waiting.result(timeout=60) is None


def test_images_are_held_while_they_are_decoded(monkeypatch):
    """Their sizes come from `describe`, from the item, or are read again where another host has read them."""
    sizes, held, holding = [(3, 4), (0, 0), (2, 2)], [], threading.local()
    items = [{"text": "12", "image": size} if size[0] else {"text": "12"} for size in sizes]

    @contextlib.contextmanager
    def hold(_, size):
        held.append(size)
        holding.size = size
        yield
        del holding.size

    class Held(Processor):
        """A processor that decodes images only while their memory is held."""

        def document(self, item, *, name):
            width, height = item.get("image", (0, 0))
            assert not width or holding.size == 4 * width * height
            return super().document(item, name=name)

    monkeypatch.setattr(SharedMemory, "hold", hold)
    for given in (items, Described(items)):
        for is_read in (True, False):
            held.clear()
            with contextlib.closing(Reader(Held(), given, "document", 4, 4)) as reader:
                wait(reader.sizes(range(3)) if is_read else [])
                for number, (width, height) in enumerate(sizes):
                    assert reader.row_item(number, (2, width * height)).result()
            assert sorted(held) == ([16, 48] if given is items and is_read else [0, 16, 48])


def test_pages_are_drawn_at_the_pixels_of_the_processor(monkeypatch):
    class Pages(Described):
        pixels = None

        def drawn_at(self, pixels):
            self.pixels = pixels
            return self

    pages = Pages([{"text": "1"}])
    monkeypatch.setattr(Processor, "page_pixels", 77, raising=False)
    Reader(Processor(), pages, "document", 4, 4).close()
    assert pages.pixels == 77


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


KINDS = {"bad": {"text": "bad"}, "torn": {"text": "123", "image": (4, 3), "torn": True}, "bad type": 7}
REASONS = {"bad": "is bad", "torn": "is torn", "bad type": "expected a text, a PIL image or a dict of both, not int"}


def with_failures(items, failures):
    """Return the items with a failure of a kind at each of these numbers."""
    return [KINDS[failures[number]] if number in failures else item for number, item in enumerate(items)]


@pytest.mark.parametrize("kind", [list, Described])
@pytest.mark.parametrize("size", [1, 40, 300])
def test_items_that_fail_are_left_out(encoder, small_windows, kind, size):
    """At the first, middle and last place, two blocks of 40 in whole, and blocks of one item."""
    items, bar = items_of(300), tqdm(total=300, file=io.StringIO())
    failures = {0: "bad", 1: "torn", 150: "torn", 151: "bad", 152: "bad type", 298: "bad", 299: "torn"}
    failures |= dict.fromkeys(range(40, 80), "bad") | dict.fromkeys(range(80, 120), "torn")
    blocks = run(encoder, kind(with_failures(items, failures)), size=size, bar=bar, allow_failures=True)
    assert [block.items for block in blocks] == [range(first, min(first + size, 300)) for first in range(0, 300, size)]
    for block in blocks:
        reasons = {number: f"item {number}: {REASONS[failures[number]]}" for number in block.items if number in failures}
        good = [number for number in block.items if number not in failures]
        assert block.failures == reasons and list(block.failures) == list(reasons) and block.numbers.tolist() == good
        np.testing.assert_array_equal(block.vectors, expected([items[number] for number in good], 3))
    assert bar.n == 300 and encoder.reduced.items == 300 - sum(kind != "torn" for kind in failures.values())


def test_a_failure_is_an_error_unless_allowed(encoder):
    with pytest.raises(UserError, match="item 2: is torn"):
        run(encoder, with_failures(items_of(9), {2: "torn", 5: "torn"}))


def test_an_item_that_changes_after_its_size_was_read_fails(encoder):
    class Growing(Described):
        def __getitem__(self, number):
            return super().__getitem__(number) | ({"text": "1" * 30} if number == 4 else {})

    items = items_of(9)
    (block,) = run(encoder, Growing(items), allow_failures=True)
    assert block.failures == {4: "item 4: was changed while it was read; try again when it is complete"}
    np.testing.assert_array_equal(block.vectors, expected(items[:4] + items[5:], 3))


def test_the_calls_of_a_block_depend_on_its_items_alone(encoder, small_windows, monkeypatch):
    items, calls = items_of(2000), defaultdict(list)
    decode = module.Encoder._decode
    monkeypatch.setattr(
        module.Encoder,
        "_decode",
        lambda self, call, block, reader: (calls[block.items].append(call), decode(self, call, block, reader))[1],
    )
    run(encoder, items, size=600)
    together = dict(calls)
    assert list(together) == [range(600), range(600, 1200), range(1200, 1800), range(1800, 2000)]
    for numbers, expected_calls in together.items():
        calls.clear()
        run(encoder, items[: numbers.stop], size=600, start=numbers.start)
        assert calls == {numbers: expected_calls}
        assert {number for call in expected_calls for row in call.rows for number in row} == {*numbers}


def test_two_hosts_report_the_same_failures(tmp_path):
    items = items_of(300)
    failures = dict.fromkeys(range(0, 300, 7), "torn") | dict.fromkeys(range(3, 300, 11), "bad") | {299: "torn"}
    (tmp_path / "items.json").write_text(json.dumps(with_failures(items, failures)))
    with Hosts(2, ["-m", "tests.encoding.hosts_program", f"--items={tmp_path / 'items.json'}", f"--out={tmp_path}"]) as hosts:
        hosts.wait()
    good = [number for number in range(300) if number not in failures]
    shares = [np.load(tmp_path / f"{host}.npz") for host in (0, 1)]
    assert sorted(np.concatenate([share["numbers"] for share in shares])) == good
    for host, share in enumerate(shares):
        np.testing.assert_array_equal(share["vectors"], expected([items[number] for number in share["numbers"]], 3))
        reasons = {str(number): f"item {number}: {REASONS[kind]}" for number, kind in sorted(failures.items())}
        assert json.loads((tmp_path / f"{host}.json").read_text()) == reasons
