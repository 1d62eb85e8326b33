"""The icons source: its splits, its drawings, and a preparation that is complete or absent."""

import io
import itertools
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from metaembed_jax.backbones.qwen2_5_vl import FAMILY as QWEN2_5_VL
from metaembed_jax.config import DataConfig
from metaembed_jax.data import sources, tokenizer
from metaembed_jax.data.sources import icons, records
from metaembed_jax.errors import UserError


@pytest.mark.parametrize("name, split", [
    ("cloud snow", "train"), ("airplane lock", "train"), ("gear", "train"), ("folder open", "train"),
    ("heart", "validation"), ("cat", "test"),
])  # fmt: skip
def test_a_names_split_never_moves(name, split):
    assert icons.split_of(name) == split


def test_names_are_words():
    assert icons.words("cloud-snow-fill") == "cloud snow fill"
    assert icons.words("git_Pull--request") == "git pull request"


def test_the_six_fonts_hold_about_16000_names_in_the_stated_shares():
    names = {name for _, _, charmap in icons.font_files() for name, _ in icons.glyphs(charmap)}
    assert 14_000 < len(names) < 17_000
    share = {split: sum(icons.split_of(name) == split for name in names) / len(names) for split in records.SPLITS}
    np.testing.assert_allclose([share["train"], share["validation"], share["test"]], [0.85, 0.05, 0.10], atol=0.01)


def test_aliases_of_one_character_are_one_name():
    charmap = {font: path for font, _, path in icons.font_files()}["codicon"]
    glyphs = icons.glyphs(charmap)
    assert len({character for _, character in glyphs}) == len(glyphs)
    names = {name for name, _ in glyphs}
    assert "add" in names and not names & {"plus", "gist new", "repo create"}


def test_drawings_are_centred_legible_and_all_different(data_dir):
    icon_records = list(itertools.chain(*(icons_of(data_dir, split) for split in records.SPLITS)))
    seen, extents = set(), []
    for record in icon_records:
        image = Image.open(io.BytesIO(record["positive"]["image"]))
        assert image.size == (icons.SIDE, icons.SIDE) and image.mode == "L"
        ink = np.asarray(image) < 128
        assert ink.any(), record["query"]["text"]
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        assert abs(rows[0] + rows[-1] - icons.SIDE + 1) <= 3 and abs(columns[0] + columns[-1] - icons.SIDE + 1) <= 3
        extent = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
        assert extent <= icons.SIDE - 2 * icons.MARGIN + 3
        extents.append(extent)
        seen.add(image.tobytes())
    assert len(seen) == len(icon_records) > 500
    assert np.mean(np.array(extents) > icons.SIDE - 2 * icons.MARGIN - 6) > 0.8  # the rest is meant to be small


def icons_of(data_dir, split):
    return records.open_split(data_dir / "icons", icons.VERSION, split)


def test_no_name_is_in_two_splits_and_every_record_is_where_its_name_belongs(data_dir):
    for split in records.SPLITS:
        assert {icons.split_of(record["query"]["text"]) for record in icons_of(data_dir, split)} == {split}


def test_preparing_again_does_nothing(data_dir, monkeypatch, capsys):
    files = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}
    monkeypatch.setattr(icons, "render_all", lambda: pytest.fail("drew again"))
    assert sources.prepare("icons", data_dir)["drawings"]["train"] == len(icons_of(data_dir, "train"))
    assert {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")} == files
    assert not [path for path in files if "incomplete" in path.name or path.name == "downloads"]
    assert capsys.readouterr().out == ""


def test_a_killed_preparation_leaves_nothing_that_looks_finished(data_dir, tmp_path, small_fonts):
    whole = icons.prepare(data_dir)
    program = (
        "import os, signal\n"
        "from metaembed_jax.data.sources import icons, records\n"
        "icons.FONTS = ('fontawesome6-regular', 'codicon')\n"
        "to_example, calls = records.to_example, []\n"
        "def kill(record):\n"
        "    calls.append(record)\n"
        "    if len(calls) == 300: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return to_example(record)\n"
        "records.to_example = kill\n"
        f"icons.prepare({str(tmp_path)!r})\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], env=os.environ, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    with pytest.raises(UserError, match="no complete preparation"):
        icons_of(tmp_path, "test")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(tokenizer, "train", lambda *_: raise_(OSError("disk full")))
        icons.prepare(tmp_path)
    with pytest.raises(UserError, match="no complete preparation"):
        icons_of(tmp_path, "test")

    assert icons.prepare(tmp_path) == whole
    assert sorted(path.name for path in (tmp_path / "icons").iterdir()) == [icons.VERSION, "tokenizer.json"]
    assert list(icons_of(tmp_path, "test")) == list(icons_of(data_dir, "test"))


def raise_(error):
    raise error


def test_tensorflow_is_not_imported(data_dir):
    program = (
        "import sys\n"
        "from metaembed_jax.data import sources\n"
        f"sources.retrieval('icons', {str(data_dir)!r}, 'test')\n"
        "sys.exit('tensorflow' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], env=os.environ).returncode == 0


def test_records_hold_encoded_images_and_end(data_dir):
    icon_records = icons_of(data_dir, "test")
    first = icon_records[0]
    assert first.keys() == {"query", "positive", "negatives", "source"}
    assert first["query"].keys() == {"text"} and first["positive"].keys() == {"image"}
    assert first["positive"]["image"].startswith(b"\x89PNG") and first["negatives"] == [] and first["source"] == "icons"
    assert len(list(icon_records)) == len(icon_records)


def test_every_field_of_the_schema_survives_writing():
    record = {
        "query": {"text": "größer", "image": b"a\0b"},
        "positive": {"text": "x"},
        "negatives": [{"text": "n"}, {"image": b"\xff"}, {"text": "m", "image": b"i"}],
        "source": "s",
    }
    features = records.features()
    assert records.from_bytes(features.serialize_example(features.encode_example(records.to_example(record)))) == record


def test_retrieval_is_every_name_against_every_drawing(data_dir):
    task = sources.retrieval("icons", data_dir, "test")
    icon_records = list(icons_of(data_dir, "test"))
    assert [query["text"] for query in task.queries] == sorted({record["query"]["text"] for record in icon_records})
    assert [document["image"] for document in task.documents] == [record["positive"]["image"] for record in icon_records]
    for query, relevant in zip(task.queries, task.relevance, strict=True):
        assert relevant == {row for row, record in enumerate(icon_records) if record["query"] == query}


def test_augmentation_is_a_pure_function_that_keeps_the_drawing(data_dir):
    plain, varied = (icons.training(DataConfig(dir=str(data_dir), augment=augment), 3) for augment in (False, True))
    again = icons.training(DataConfig(dir=str(data_dir), augment=True), 3)
    assert len(plain) == len(varied)
    for epoch in range(icons.PLAIN_EPOCHS):
        assert varied.compose(5, epoch, 0) == plain[5]
    first, same, other = varied.compose(5, 2, 0), again.compose(5, 2, 99), varied.compose(5, 3, 0)
    assert first["query"] == plain[5]["query"]
    assert first["positive"]["image"].tobytes() == same["positive"]["image"].tobytes() != other["positive"]["image"].tobytes()
    for row in range(50):
        drawing = np.asarray(varied.compose(row, 2, 0)["positive"]["image"])
        assert drawing.shape == (icons.SIDE, icons.SIDE) and drawing.min() < 128
        # Nothing is cut off: the ink is that of the original, scaled down to 64 % of its area at the least.
        original = np.asarray(Image.open(io.BytesIO(plain[row]["positive"]["image"])))
        assert 0.6 < (255.0 - drawing).sum() / (255.0 - original).sum() < 1.05


def test_the_vocabulary_is_learned_from_training_names_and_encodes_anything(data_dir):
    learned = Tokenizer.from_file(str(data_dir / "icons" / "tokenizer.json"))
    assert learned.get_vocab_size() <= 2048
    assert [learned.token_to_id(token) for token in QWEN2_5_VL.special_tokens] == list(range(6))
    for text in ("Query: cloud arrow", "Ünïcode \u2603 \U0001f600\n", "user\n", "Describe the image."):
        assert learned.decode(learned.encode(text).ids) == text
    assert len(learned.encode("Query: folder").ids) == 3


def test_a_missing_font_and_an_unknown_source_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(icons, "FONTS", ("comic-sans",))
    with pytest.raises(UserError, match="comic-sans"):
        icons.font_files()
    with pytest.raises(UserError, match="photos holds no complete preparation of a source .photos."):
        sources.prepare("photos", tmp_path)
