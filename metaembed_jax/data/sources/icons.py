"""Icon search: about 16,000 hand-drawn icons and their names, from the fonts inside the package `qtawesome`.

`importlib.metadata` finds the fonts; the package itself, which needs Qt, is never imported. A record's query is the name as words
("cloud snow"), its positive the drawing, black on white. A hash of the name chooses its split, so a name never changes its split.
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
SMALLEST = 0.5  # of the em: a smaller drawing (a dot) does not fill the canvas, so that "circle small" stays small


class Icon(NamedTuple):
    """A drawing of a glyph.

    Attributes:
      name: name of the glyph in words.
    """

    name: str
    font: str
    png: bytes


def split_of(name: str) -> str:
    """Return the split of a name, by its hash: 10 % are test, 5 % validation, the rest train."""
    percent = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 100
    return "test" if percent < 10 else "validation" if percent < 15 else "train"


def words(name: str) -> str:
    """Return a name of a charmap as words: "cloud-snow-fill" -> "cloud snow fill"."""
    return " ".join(re.split(r"[-_\s]+", name.strip().lower())).strip()


def font_files() -> list[tuple[str, Path, Path]]:
    """Return (font, font file, charmap file) of `FONTS`, in that order.

    Raises:
      UserError: qtawesome or one of its fonts is missing.
    """
    try:
        files = [file.locate() for file in importlib.metadata.files("qtawesome") or ()]
    except importlib.metadata.PackageNotFoundError:
        raise UserError("the icons source reads the fonts of the package qtawesome: pip install qtawesome==1.4.2") from None
    fonts = []
    for font in FONTS:
        of_font = [Path(file) for file in files if Path(file).name.startswith(font)]
        drawings, charmaps = [[file for file in of_font if file.suffix == suffix] for suffix in (".ttf", ".json")]
        if len(drawings) != 1 or len(charmaps) != 1:
            version = importlib.metadata.version("qtawesome")
            raise UserError(f"qtawesome {version} has no font and charmap of {font!r}: pip install 'qtawesome==1.4.2'")
        fonts.append((font, drawings[0], charmaps[0]))
    return fonts


def glyphs(charmap: Path) -> list[tuple[str, str]]:
    """Return (name as words, character) of a charmap: a character's shortest name, and of equal lengths the first by letters."""
    names = {}
    for name, code in json.loads(charmap.read_text()).items():
        names.setdefault(int(code, 16), []).append(words(name))
    kept = [(min(aliases, key=lambda name: (len(name), name)), chr(code)) for code, aliases in names.items()]
    return sorted(kept)


class Renderer:
    """Draws the glyphs of a font, black on white and centred. The larger side of the ink fills the canvas up to the margin."""

    def __init__(self, path: Path):
        self.data = path.read_bytes()
        self.sizes: dict[int, ImageFont.FreeTypeFont] = {}

    def font(self, size: int) -> ImageFont.FreeTypeFont:
        """Return the font at a size."""
        if size not in self.sizes:
            self.sizes[size] = ImageFont.truetype(io.BytesIO(self.data), size, layout_engine=ImageFont.Layout.BASIC)
        return self.sizes[size]

    def draw(self, character: str) -> Image.Image | None:
        """Return the drawing, mode L, `SIDE` x `SIDE`; None if the glyph is empty."""
        # Pillow's own bounding boxes count the advance width as ink, so a small drawing gives the box of the ink first.
        x0, y0, x1, y1 = self.ink(character, SKETCH, (SKETCH, SKETCH), 3 * SKETCH)[0]
        if x0 == x1:
            return None
        scale = (SIDE - 2 * MARGIN) / max(x1 - x0, y1 - y0, SMALLEST * SKETCH)
        origin = (SIDE - (x0 - SKETCH) * scale, SIDE - (y0 - SKETCH) * scale)
        _, glyph = self.ink(character, int(SKETCH * scale), origin, 3 * SIDE)
        if not any(glyph.histogram()[128:]):
            return None
        canvas = Image.new("L", (SIDE, SIDE), 255)
        x, y = (SIDE - glyph.width) // 2, (SIDE - glyph.height) // 2
        canvas.paste(0, (x, y, x + glyph.width, y + glyph.height), mask=glyph)
        return canvas

    def ink(self, character: str, size: int, origin: tuple[float, float], side: int) -> tuple[tuple[int, ...], Image.Image]:
        """Draw a glyph at `origin` of a canvas of `side` pixels, and return the box of its ink, and the ink (mode L, white)."""
        canvas = Image.new("L", (side, side), 0)
        ImageDraw.Draw(canvas).text((int(origin[0]), int(origin[1])), character, fill=255, font=self.font(size))
        box = canvas.getbbox() or (0, 0, 0, 0)
        return box, canvas.crop(box)


def render_all() -> Iterator[Icon]:
    """Yield every icon once.

    A drawing with the pixels of an earlier one is dropped, whatever its name: otherwise an image of the test split could be a
    training image under another name.
    """
    seen = set()
    characters = [(font, path, name, character) for font, path, charmap in font_files() for name, character in glyphs(charmap)]
    renderers = {}
    for font, path, name, character in tqdm(characters, desc="icons: drawing", unit="icon", mininterval=0.5):
        drawing = renderers.setdefault(font, Renderer(path)).draw(character)
        if drawing is None or (pixels := drawing.tobytes()) in seen:
            continue
        seen.add(pixels)
        png = io.BytesIO()
        drawing.save(png, "png", compress_level=3)
        yield Icon(name, font, png.getvalue())


class Icons(tfds.core.GeneratorBasedBuilder):
    """Writer of the icons as ArrayRecord."""

    VERSION = tfds.core.Version(VERSION)
    name = NAME

    def __init__(self, *, icons: Sequence[Icon], **kwargs):
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


def prepare(data_dir: str | Path) -> dict:
    """Draw and write the icons and their tokenizer to `data_dir`/icons, unless they are prepared already.

    Returns:
      The marker: {"version", "fingerprint", "drawings" and "names" of each split}. It is written last: after a preparation that was
      killed, the next call starts again.
    """
    directory = Path(data_dir) / NAME
    if marker := records.read_marker(directory, VERSION):
        return marker
    icons = list(render_all())
    records.write(Icons(icons=icons, data_dir=str(data_dir), file_format="array_record"))
    train_names = sorted({icon.name for icon in icons if split_of(icon.name) == "train"})
    # Models trained from scratch are of the default family; others have the vocabulary of their checkpoint.
    tokenizer.train(train_names, directory / "tokenizer.json", family(ModelSettings().backbone))
    in_split = {split: [icon for icon in icons if split_of(icon.name) == split] for split in records.SPLITS}
    marker = {
        "version": VERSION,
        "fingerprint": records.fingerprint((icon.name, icon.png) for icon in icons),
        "drawings": {split: len(chosen) for split, chosen in in_split.items()},
        "names": {split: len({icon.name for icon in chosen}) for split, chosen in in_split.items()},
    }
    records.write_marker(directory, marker)
    print(
        f"icons: {sum(marker['drawings'].values())} drawings ({marker['drawings']}) of {sum(marker['names'].values())} names "
        f"({marker['names']}), fingerprint {marker['fingerprint']}"
    )
    return marker


def retrieval(pairs: Sequence[dict]) -> records.Retrieval:
    """Return a split as a search task: a query for each name, a document for each drawing, relevant where the names are equal."""
    drawings = [(record["query"]["text"], record["positive"]["image"]) for record in pairs]
    names = sorted({name for name, _ in drawings})
    holders = {name: set() for name in names}
    for document, (name, _) in enumerate(drawings):
        holders[name].add(document)
    queries, documents = [{"text": name} for name in names], [{"image": image} for _, image in drawings]
    return records.Retrieval(queries, documents, [holders[name] for name in names])


def training(data: DataConfig, seed: int) -> Sequence:
    """Return the training split; with `config.data.augment`, drawings vary after the first epochs."""
    train = fixed_training(data.dir)
    return VariedIcons(train, seed) if data.augment else train


def fixed_training(data_dir: str | Path) -> records.Records:
    """Return the training split as prepared."""
    return records.open_split(Path(data_dir) / NAME, VERSION, "train").with_descriptions()


class VariedIcons(Sequence[dict]):
    """Icons at a random size and position on the canvas: a pure function of (seed, epoch, row).

    The first `PLAIN_EPOCHS` leave them unchanged: a model learns much faster from drawings that do not move, and begins to memorize
    them only later.

    Attributes:
      stored: the icons as prepared; variation keeps their descriptions.
    """

    def __init__(self, stored: records.Records, seed: int):
        self.stored, self.seed = stored, seed

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, row: int) -> dict:
        return self.compose(row, 0, 0)

    def compose(self, row: int, epoch: int, step: int) -> dict:
        """Return the record of a row in an epoch."""
        record = self.stored[row]
        if epoch < PLAIN_EPOCHS:
            return record
        random = np.random.default_rng([self.seed, epoch, row])
        return record | {"positive": {"image": moved(Image.open(io.BytesIO(record["positive"]["image"])), random)}}

    def describe(self, row: int, epoch: int, step: int) -> dict:
        """Return the description of a record; `moved` keeps the size of its image."""
        return self.stored.describe(row)


def moved(drawing: Image.Image, random: np.random.Generator) -> Image.Image:
    """Return a drawing at 80 to 100 % of its size, at a random position on a white canvas of the old size."""
    side = int(random.integers(int(0.8 * SIDE), SIDE, endpoint=True))
    x, y = (int(offset) for offset in random.integers(0, SIDE - side, size=2, endpoint=True))
    canvas = Image.new("L", (SIDE, SIDE), 255)
    canvas.paste(drawing.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=None), (x, y))
    return canvas
