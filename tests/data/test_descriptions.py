"""Descriptions of records, against the records with the sizes of their decoded images."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import pytest

from metaembed_jax.config import DataConfig
from metaembed_jax.data import sources
from metaembed_jax.data.sources import descriptions, preparation, records
from metaembed_jax.errors import UserError
from metaembed_jax.files import locked
from metaembed_jax.inputs.images import open_image
from tests.data.varied_pairs import prepare_pairs


def sized(record):
    """The record with the sizes of its decoded images."""

    def item(content):
        return content | {"image": open_image(content["image"], "x").size} if "image" in content else content

    negatives = [item(content) for content in record["negatives"]]
    return record | {"query": item(record["query"]), "positive": item(record["positive"]), "negatives": negatives}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare_pairs(tmp_path_factory.mktemp("pairs") / "in")


@pytest.fixture
def copied(prepared, tmp_path):
    """A copy of the source without its descriptions, and the descriptions."""
    folder = tmp_path / "mine"
    sources_files = {path.name: path.read_bytes() for path in (prepared / "mine" / preparation.VERSION).glob("*.*")}
    (folder / preparation.VERSION).mkdir(parents=True)
    for name, content in sources_files.items():
        if not name.startswith("described"):
            (folder / preparation.VERSION / name).write_bytes(content)
    return folder, {name: content for name, content in sources_files.items() if name.startswith("described")}


def files_of(folder):
    return {path.name: path.read_bytes() for path in (folder / preparation.VERSION).glob("described-*.jsonl")}


@pytest.mark.parametrize("name, augment", [("icons", False), ("icons", True), ("boards", False)])
def test_generated_sources_describe_records_without_drawing_them(data_dir, name, augment, monkeypatch):
    data = DataConfig(
        dir=str(data_dir), sources=((name, 1.0, 0),), augment=augment, page_side=112, curriculum=((10, 1, 2), (0, 4, 9))
    )
    source = sources.training_records(data, seed=3)[0]
    asked = [(row, epoch, step) for row in (0, 5, len(source) - 1) for epoch, step in ((0, 0), (2, 9), (7, 50))]
    composed = [sized(source.compose(*at) if hasattr(source, "compose") else source[at[0]]) for at in asked]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("metaembed_jax.data.sources.boards.compose", lambda *_: pytest.fail("drew"))
    assert [source.describe(*at) for at in asked] == composed


def test_prepared_sources_describe_their_records(prepared):
    for split in records.open_splits(prepared / "mine", preparation.VERSION):
        again = pickle.loads(pickle.dumps(split))
        assert [again.describe(row, 3, 4) for row in range(len(split))] == [sized(record) for record in split]
    assert [len(split) for split in records.open_splits(prepared / "mine", preparation.VERSION)] == [41, 2, 2]
    assert {path.name for path in (prepared / "mine" / preparation.VERSION).glob("*described*")} == {
        f"described-{split}.jsonl" for split in records.SPLITS
    }


def test_a_source_without_descriptions_gets_them_once(copied, monkeypatch, capsys):
    folder, expected = copied
    marker = (folder / preparation.VERSION / records.MARKER).read_bytes()
    for _ in range(2):
        records.open_splits(folder, preparation.VERSION)
        assert files_of(folder) == expected
        monkeypatch.setattr(descriptions, "image_size", lambda *_: pytest.fail("read again"))
    assert (folder / preparation.VERSION / records.MARKER).read_bytes() == marker
    assert "mine: sizes of images: 100%" in capsys.readouterr().err


def test_damaged_descriptions_are_written_again_or_named(copied):
    folder, expected = copied
    records.open_splits(folder, preparation.VERSION)
    file = descriptions.file_of(folder / preparation.VERSION, "train")
    whole = file.read_bytes()
    for damaged in (b"", b"garbage", whole[:-1], whole[:-30], whole + b"{}\n"):
        file.write_bytes(damaged)
        records.open_splits(folder, preparation.VERSION)
        assert files_of(folder) == expected
    file.write_bytes(whole.replace(b'"positive"', b'"negative"', 1))
    with pytest.raises(UserError, match="described-train.jsonl, line 1 is damaged; remove the file"):
        records.open_split(folder, preparation.VERSION, "train").with_descriptions().describe(0)


def test_killed_while_it_adds_descriptions_it_starts_again(copied):
    folder, expected = copied
    program = (
        "import os, signal\n"
        "from metaembed_jax.data.sources import descriptions, preparation, records\n"
        "write, descriptions.CHUNK_RECORDS = descriptions.to_line, 4\n"
        "def kill(description, calls=[]):\n"
        "    calls.append(description)\n"
        "    if len(calls) == 20: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return write(description)\n"
        "descriptions.to_line = kill\n"
        f"records.open_split({str(folder)!r}, preparation.VERSION, 'train').with_descriptions()\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], env=os.environ, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert files_of(folder) == {}
    records.open_splits(folder, preparation.VERSION)
    assert files_of(folder) == expected


def test_processes_wait_for_the_one_that_adds_descriptions(copied, monkeypatch, capsys):
    folder, expected = copied
    monkeypatch.setattr(descriptions, "_write", lambda *_: pytest.fail("written twice"))
    split, read = records.open_split(folder, preparation.VERSION, "train"), []
    with locked(folder / preparation.VERSION / descriptions.LOCK, "busy"):
        waiting = threading.Thread(target=lambda: read.append(split.with_descriptions().describe(1)))
        waiting.start()
        while waiting.is_alive() and "another process reads the sizes of images" not in capsys.readouterr().out:
            time.sleep(0.01)
        for name, content in expected.items():
            (folder / preparation.VERSION / name).write_bytes(content)
    waiting.join()
    assert read == [sized(split[1])]


def test_a_folder_that_cannot_be_written_is_described_from_its_records(copied, monkeypatch, capsys):
    folder, _ = copied
    monkeypatch.setattr(os, "access", lambda *_: False)
    split = records.open_split(folder, preparation.VERSION, "train").with_descriptions()
    assert [split.describe(row) for row in range(5)] == [sized(split[row]) for row in range(5)]
    assert files_of(folder) == {} and f"{folder / preparation.VERSION} cannot be written" in capsys.readouterr().out


def test_the_summary_names_the_largest(prepared):
    every = [sized(record) for split in records.open_splits(prepared / "mine", preparation.VERSION) for record in split]
    items = [item for record in every for item in (record["query"], record["positive"], *record["negatives"])]
    shapes, texts = [item["image"] for item in items if "image" in item], [item["text"] for item in items if "text" in item]
    width, height = max(shapes, key=lambda shape: shape[0] * shape[1])
    expected = (
        f"{len(shapes)} images, the largest {width}x{height}; {len(texts)} texts, the longest of {max(map(len, texts))} characters"
    )
    assert sources.summary("mine", prepared) == expected


def test_a_source_of_few_rows_has_empty_splits(tmp_path):
    (tmp_path / "few.jsonl").write_text('{"query": "a", "positive": "b"}\n' * 3)
    sources.prepare_from("pairs", tmp_path / "few.jsonl", tmp_path / "out", 0, 0)
    train, validation, _ = records.open_splits(tmp_path / "out" / "few", preparation.VERSION)
    assert len(train) == 3 and len(validation) == 0 and not list(validation)
    assert sources.with_pairs(["few"], tmp_path / "out", "validation") == []
