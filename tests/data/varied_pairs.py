"""A small source of pairs of many sizes: turned JPEGs, thin images, Unicode, none to several negatives."""

import io

import numpy as np
from PIL import Image

from metaembed_jax.data import sources
from tests.data.field_files import write_pairs

WORDS = ["red", "été", "漢字", "👩‍👩‍👧", "\n", "Ωμέγα", '"', "e\u0301", "a b  c"]


def write_image(path, number):
    """Write noise: JPEGs of each orientation, and other formats."""
    random = np.random.default_rng(number)
    width, height = int(random.integers(1, 200)), int(random.integers(1, 200))
    image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = number % 9
    file = io.BytesIO()
    image.save(file, ("jpeg", "jpeg", "png", "tiff", "webp")[number % 5], exif=exif)
    path.write_bytes(file.getvalue())


def pair(number):
    """Return a row of pairs."""
    random = np.random.default_rng([number, 1])

    def text():
        return " ".join(random.choice(WORDS, int(random.integers(1, 60))))

    row = {"query": f"{number} {text()}", "positive_image": f"{number}.img"}
    row |= {"query_image": f"{number // 2}.img"} if number % 3 == 0 else {}
    row |= {"positive": text()} if number % 4 == 0 else {}
    row["negatives"] = [text() if negative % 2 else "" for negative in range(number % 4)]
    return row | {"negative_images": ["" if negative % 2 else f"{number}.img" for negative in range(number % 4)]}


def prepare_pairs(folder, rows=45):
    """Prepare the source `mine`, and return the folder of all sources."""
    folder.mkdir()
    for number in range(rows):
        write_image(folder / f"{number}.img", number)
    write_pairs(folder / "mine.jsonl", [pair(number) for number in range(rows)])
    sources.prepare_from("pairs", folder / "mine.jsonl", folder / "data", 0, 0)
    return folder / "data"
