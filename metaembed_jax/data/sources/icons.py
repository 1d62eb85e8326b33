"""Icon search: about 16,000 hand-drawn icons and their names, from the fonts inside the package `qtawesome`.

The fonts are found through `importlib.metadata`; the package itself (which wants Qt) is never imported. A record's query is the
name as words ("cloud snow"), its positive the drawing, black on white. Splits are by name, by a hash: a name is in one split, for
ever.
"""

import hashlib
import importlib.metadata
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from metaembed_jax.backbones.family import family
from metaembed_jax.config.run import DataConfig, ModelSettings
from metaembed_jax.data import tokenizer
from metaembed_jax.data.sources import records
from metaembed_jax.errors import UserError

NAME = "icons"
VERSION = "1.1.0"
FONTS = ("materialdesignicons6", "phosphor", "remixicon", "fontawesome6-solid", "fontawesome6-regular", "codicon")
SIDE = 112  # pixels of a drawing's canvas
MARGIN = 6  # white pixels around the largest drawing
PLAIN_EPOCHS = 2  # before augmentation starts
SKETCH = 64  # font size at which a glyph is measured
SMALLEST = 0.5  # of the em: a smaller drawing (a dot) is not blown up to the whole canvas, so that "circle small" stays small


class Icon(NamedTuple):
    """One drawing: its name as words, the font it is from, and its PNG."""

    name: str
    font: str
    png: bytes


def split_of(name: str) -> str:
    """The split of a name: 10 % test, 5 % validation, the rest train, by a hash of the words, so that no other name can move it."""
    percent = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 100
    return "test" if percent < 10 else "validation" if percent < 15 else "train"


def words(name: str) -> str:
    """A charmap's name as words: "cloud-snow-fill" -> "cloud snow fill"."""
    return " ".join(re.split(r"[-_\s]+", name.strip().lower())).strip()


def font_files() -> list[tuple[str, Path, Path]]:
    """(font, font file, charmap file) of `FONTS`, in that order.

    Raises:
      UserError: qtawesome or one of its fonts is missing.
    """
    try:
        files = [file.locate() for file in importlib.metadata.files("qtawesome") or ()]
    except importlib.metadata.PackageNotFoundError:
        raise UserError("the icons source reads the fonts of the package qtawesome: pip install qtawesome==1.4.2") from None
    found = []
    for font in FONTS:
        ours = [Path(file) for file in files if Path(file).name.startswith(font)]
        drawings, charmaps = [file for file in ours if file.suffix == ".ttf"], [file for file in ours if file.suffix == ".json"]
        if len(drawings) != 1 or len(charmaps) != 1:
            version = importlib.metadata.version("qtawesome")
            raise UserError(f"qtawesome {version} has no font and charmap of {font!r}: pip install 'qtawesome==1.4.2'")
        found.append((font, drawings[0], charmaps[0]))
    return found


def glyphs(charmap: Path) -> list[tuple[str, str]]:
    """(name as words, character) of a charmap. Of a character's aliases the shortest name stays, then the first by letters."""
    names = {}
    for name, code in json.loads(charmap.read_text()).items():
        names.setdefault(int(code, 16), []).append(words(name))
    kept = [(min(aliases, key=lambda name: (len(name), name)), chr(code)) for code, aliases in names.items()]
    return sorted(kept)


class Renderer:
    """Draws the glyphs of one font, black on white, centred, the larger side of the ink filling the canvas up to the margin."""

    def __init__(self, path: Path):
        self.data = path.read_bytes()
        self.sizes: dict[int, ImageFont.FreeTypeFont] = {}

    def at(self, size: int) -> ImageFont.FreeTypeFont:
        if size not in self.sizes:
            self.sizes[size] = ImageFont.truetype(io.BytesIO(self.data), size, layout_engine=ImageFont.Layout.BASIC)
        return self.sizes[size]

    def draw(self, character: str) -> Image.Image | None:
        """The drawing, mode L, `SIDE` x `SIDE`; None where the glyph is empty."""
        # Pillow's own bounding boxes count the advance width as ink, so the ink is looked for in a small picture first.
        left, top, right, bottom = self.ink(character, SKETCH, (SKETCH, SKETCH), 3 * SKETCH)[0]
        if right == left:
            return None
        scale = (SIDE - 2 * MARGIN) / max(right - left, bottom - top, SMALLEST * SKETCH)
        origin = (SIDE - (left - SKETCH) * scale, SIDE - (top - SKETCH) * scale)
        _, glyph = self.ink(character, int(SKETCH * scale), origin, 3 * SIDE)
        if glyph.getextrema()[1] < 128:
            return None
        canvas = Image.new("L", (SIDE, SIDE), 255)
        x, y = (SIDE - glyph.width) // 2, (SIDE - glyph.height) // 2
        canvas.paste(0, (x, y, x + glyph.width, y + glyph.height), mask=glyph)
        return canvas

    def ink(self, character: str, size: int, origin: tuple[float, float], side: int) -> tuple[tuple[int, ...], Image.Image]:
        """The box of the ink of a glyph drawn at `origin` of a canvas of `side` pixels, and the ink itself (mode L, white)."""
        canvas = Image.new("L", (side, side), 0)
        ImageDraw.Draw(canvas).text((int(origin[0]), int(origin[1])), character, fill=255, font=self.at(size))
        box = canvas.getbbox() or (0, 0, 0, 0)
        return box, canvas.crop(box)


def render_all() -> Iterator[Icon]:
    """Every icon once.

    A drawing that came before, pixel for pixel, under whatever name, is an alias and is dropped: a picture has one name, so no
    picture of the test split can be a training picture under another name.
    """
    seen = set()
    todo = [(font, path, name, character) for font, path, charmap in font_files() for name, character in glyphs(charmap)]
    renderers = {}
    for font, path, name, character in tqdm(todo, desc="icons: drawing", unit="icon", mininterval=0.5):
        drawing = renderers.setdefault(font, Renderer(path)).draw(character)
        if drawing is None or (pixels := drawing.tobytes()) in seen:
            continue
        seen.add(pixels)
        png = io.BytesIO()
        drawing.save(png, "png", compress_level=3)
        yield Icon(name, font, png.getvalue())


class Icons(tfds.core.GeneratorBasedBuilder):
    """Writes the icons as ArrayRecord."""

    VERSION = tfds.core.Version(VERSION)
    name = NAME

    def __init__(self, *, icons: list[Icon] = (), **kwargs):
        self.icons = icons
        super().__init__(**kwargs)

    def _info(self):
        return self.dataset_info_from_configs(features=records.features(), description=__doc__)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in records.SPLITS}

    def _generate_examples(self, split):
        for number, icon in enumerate(self.icons):
            if split_of(icon.name) == split:
                record = {"query": {"text": icon.name}, "positive": {"image": icon.png}, "source": NAME}
                yield number, records.to_example(record)


def fingerprint(icons: list[Icon]) -> str:
    """16 hex digits of everything that was written."""
    digest = hashlib.sha256()
    for icon in icons:
        digest.update(icon.name.encode() + b"\0" + hashlib.sha256(icon.png).digest())
    return digest.hexdigest()[:16]


def prepare(data_dir: str | Path) -> dict:
    """Draws and writes the icons and their tokenizer to `data_dir`/icons; already done, does nothing.

    Returns:
      The marker: {"version", "fingerprint", "drawings" and "names" of each split}. It is written last: killed before that, the
      next call starts anew.
    """
    directory = Path(data_dir) / NAME
    if marker := records.read_marker(directory, VERSION):
        return marker
    icons = list(render_all())
    records.write(Icons(icons=icons, data_dir=str(data_dir), file_format="array_record"))
    train_names = sorted({icon.name for icon in icons if split_of(icon.name) == "train"})
    # Models that are trained from scratch are of the default family; others start with a vocabulary of their own.
    tokenizer.train(train_names, directory / "tokenizer.json", family(ModelSettings().backbone))
    in_split = {split: [icon for icon in icons if split_of(icon.name) == split] for split in records.SPLITS}
    marker = {
        "version": VERSION,
        "fingerprint": fingerprint(icons),
        "drawings": {split: len(chosen) for split, chosen in in_split.items()},
        "names": {split: len({icon.name for icon in chosen}) for split, chosen in in_split.items()},
    }
    records.write_marker(directory, marker)
    print(
        f"icons: {sum(marker['drawings'].values())} drawings ({marker['drawings']}) of {sum(marker['names'].values())} names "
        f"({marker['names']}), fingerprint {marker['fingerprint']}"
    )
    return marker


def retrieval(data_dir: str | Path, split: str) -> records.Retrieval:
    """A split as a search task: a query for each name, a document for each drawing, relevant where the names are equal."""
    found = records.open_split(Path(data_dir) / NAME, VERSION, split)
    drawings = [(record["query"]["text"], record["positive"]["image"]) for record in found]
    names = sorted({name for name, _ in drawings})
    holders = {name: set() for name in names}
    for document, (name, _) in enumerate(drawings):
        holders[name].add(document)
    queries, documents = [{"text": name} for name in names], [{"image": image} for _, image in drawings]
    return records.Retrieval(queries, documents, [holders[name] for name in names])


def training(data: DataConfig, seed: int) -> Sequence:
    """The training split, with `config.data.augment` each drawing in another size and place in every epoch after the first two."""
    found = records.open_split(Path(data.dir) / NAME, VERSION, "train").with_descriptions()
    return Varied(found, seed) if data.augment else found


class Varied(Sequence):
    """The records with their drawings at a random size and place on the canvas, a pure function of (seed, epoch, row).

    The first `PLAIN_EPOCHS` show them as they are: a model learns much faster from what stays in its place, and begins to learn
    drawings by heart only later.
    """

    def __init__(self, found: records.Records, seed: int):
        self.found, self.seed = found, seed

    @property
    def stored(self) -> records.Records:
        """The records whose descriptions are the same in every epoch and step."""
        return self.found

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, row: int) -> dict:
        return self.compose(row, 0, 0)

    def compose(self, row: int, epoch: int, step: int) -> dict:
        record = self.found[row]
        if epoch < PLAIN_EPOCHS:
            return record
        random = np.random.default_rng([self.seed, epoch, row])
        return record | {"positive": {"image": moved(Image.open(io.BytesIO(record["positive"]["image"])), random)}}

    def described(self, row: int, epoch: int, step: int) -> dict:
        """The record without its image: `moved` keeps the size."""
        return self.found.described(row)


def moved(drawing: Image.Image, random: np.random.Generator) -> Image.Image:
    """The drawing at 80 to 100 % of its size, anywhere on a white canvas that holds it."""
    side = int(random.integers(int(0.8 * SIDE), SIDE, endpoint=True))
    left, top = (int(place) for place in random.integers(0, SIDE - side, size=2, endpoint=True))
    canvas = Image.new("L", (SIDE, SIDE), 255)
    canvas.paste(drawing.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=None), (left, top))
    return canvas
