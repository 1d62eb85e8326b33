"""Races the making of batches against transformers' image processor in a torch DataLoader: `python benchmarks/data.py`.

Both start from the same JPEG bytes in memory and have as many worker processes, one thread each. Ours ends with whole training
batches of `data.pipeline`: prompts in tokens, pixels in uint8 patches, window by window. Theirs ends with `pixel_values` alone, the
images of a batch at once, as collators do it.

    pages        1240x1754 pixels, written text
    photos       640x480 pixels, soft noise

Before anything is timed, one batch of both is compared: the same numbers after normalisation.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from metaembed_jax.backbones.qwen.images import to_units
from metaembed_jax.backbones.qwen2_5_vl import FAMILY as QWEN2_5_VL
from metaembed_jax.backbones.qwen2_5_vl.inputs import Images
from metaembed_jax.batch.rows import filled_shares
from metaembed_jax.config import RunConfig, load_config, with_keys
from metaembed_jax.data import tokenizer
from metaembed_jax.data.pipeline import iterate, training_batches
from metaembed_jax.data.row_plan import plan_rows
from metaembed_jax.data.run_items import run_items
from metaembed_jax.inputs.images import open_image
from metaembed_jax.network_config import model_config, row_limits

BATCH, SOURCE, WARM = 8, 64, 4  # images; images in all; batches that are not timed
MEAN, STD = np.float32([0.48145466, 0.4578275, 0.40821073]), np.float32([0.26862954, 0.26130258, 0.27577711])


def main() -> None:
    """Compares one batch, then times both in turns and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    parser.add_argument("--batches", type=int, default=12, help="batches of 8 a turn (default: 12)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="processes (default: 1, then 2)")
    arguments = parser.parse_args()
    sizes = Images(28 * 28, 1024 * 28 * 28)
    with tempfile.TemporaryDirectory() as scratch:
        learned = tokenizer.train(["which page is it?"] * 100, Path(scratch) / "tokenizer.json", QWEN2_5_VL, vocabulary=700)
    for name, draw in (("pages", page), ("photos", photo)):
        encoded = [draw(number) for number in range(SOURCE)]
        config = run_config(name, WARM + arguments.batches)
        records = [{"query": {"text": "which page is it?"}, "positive": {"image": one}, "source": name} for one in encoded]
        items = run_items(config, QWEN2_5_VL.Processor(learned, sizes, row_limits(config)), [records])
        shape = plan_rows(items, row_limits(config)).shape(0, 1)
        dataset = training_batches(items, shape, model_config(config).architecture.layout)
        largest = difference(encoded[0], sizes)
        fractions = ", ".join(f"{100 * value:.0f} % of {key}" for key, value in filled_shares(dataset[0].rows) if key != "vectors")
        size = np.mean([len(one) for one in encoded]) / 1000
        print(f"{name}: {size:.0f} kB of JPEG; largest difference {largest:.1e}; rows hold {fractions}")
        for workers in arguments.workers:
            sides = {
                "metaembed_jax": partial(iterate, dataset, 0, config.schedule.steps, workers),
                "transformers": partial(dataloader, encoded, sizes, workers, config.schedule.steps),
            }
            rates = {side: [] for side in sides}
            for _ in range(arguments.rounds):
                for side, batches in sides.items():
                    rates[side].append(rate(batches(), arguments.batches))
            medians = {side: statistics.median(values) / workers for side, values in rates.items()}
            ratio = medians["metaembed_jax"] / medians["transformers"]
            listed = ", ".join(f"{side} {value:.1f}" for side, value in medians.items())
            print(f"  {workers} worker{'s' * (workers > 1)}, images a second and worker: {listed}; ratio {ratio:.2f}", flush=True)


def run_config(name: str, steps: int):
    """One image a pair, in rows of the family's default."""
    return with_keys(
        RunConfig(),
        {
            "model.architecture": load_config(str(Path(__file__).parents[1] / "configs" / "7b.py")).model.architecture,
            "data.sources": ((name, 1.0, 0),),
            "rows.batch_size": BATCH,
            "schedule.steps": steps,
        },
    )


def rate(batches: Iterator, count: int) -> float:
    """Images a second, from the moment when both sides' workers are at work."""
    for _ in range(WARM):
        next(batches)
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    seconds = time.perf_counter() - began
    assert next(batches, None) is None  # so that the workers end
    return BATCH * count / seconds


class Encoded:
    """A torch data set of decoded images, which begin again until there are enough."""

    def __init__(self, encoded: list[bytes], count: int):
        self.encoded, self.count = encoded, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Image.Image:
        return Image.open(io.BytesIO(self.encoded[number % len(self.encoded)])).convert("RGB")


class Collator:
    """A batch of images by transformers' Pillow processor."""

    def __init__(self, sizes: Images):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.processor = Qwen2VLImageProcessorPil(size={"shortest_edge": sizes.min_pixels, "longest_edge": sizes.max_pixels})

    def __call__(self, images: list[Image.Image]) -> dict:
        return dict(self.processor(images, return_tensors="pt"))


def dataloader(encoded: list[bytes], sizes: Images, workers: int, batches: int) -> Iterator[dict]:
    """Their batches, two ahead for each worker as is the default there."""
    from torch.utils.data import DataLoader

    images, options = Encoded(encoded, BATCH * batches), dict(num_workers=workers, multiprocessing_context="spawn")
    return iter(DataLoader(images, BATCH, collate_fn=Collator(sizes), **options))


def difference(encoded: bytes, sizes: Images) -> float:
    """The largest difference of a normalised number of one image."""
    theirs = Collator(sizes)([Image.open(io.BytesIO(encoded)).convert("RGB")])["pixel_values"].numpy().reshape(-1, 3, 2, 196)
    image = open_image(encoded, "image")
    units, _ = to_units(image, sizes.grid(*image.size, None, None, "image"), sizes)
    ours = units.reshape(-1, 3, 196)
    ours = (ours.astype(np.float32) / 255 - MEAN[:, None]) / STD[:, None]
    return max(float(np.abs(ours - theirs[:, :, frame]).max()) for frame in range(2))


def page(number: int) -> bytes:
    """Lines of words on white."""
    image = Image.new("RGB", (1240, 1754), "white")
    draw, random = ImageDraw.Draw(image), np.random.default_rng(number)
    for line in range(60):
        words = " ".join("".join(random.choice(list("abcdefghij"), random.integers(2, 9))) for _ in range(18))
        draw.text((80, 80 + 27 * line), words, fill="black", font_size=18)
    return jpeg(image)


def photo(number: int) -> bytes:
    """Noise, blurred as a photo is."""
    pixels = np.random.default_rng(number).integers(0, 256, (480, 640, 3), np.uint8)
    return jpeg(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2)))


def jpeg(image: Image.Image) -> bytes:
    """Its bytes at quality 90."""
    file = io.BytesIO()
    image.save(file, "jpeg", quality=90)
    return file.getvalue()


if __name__ == "__main__":
    main()
