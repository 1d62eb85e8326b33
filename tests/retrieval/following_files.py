"""Files that indexes follow, and checks of what an index has stored of them."""

import os

import numpy as np
from PIL import Image

from tests.retrieval.fake_model import content, vectors


def save(path, *colours):
    """Write an image of a colour, or a PDF or TIFF file with a page of each; its time is later than that of the last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pages = [Image.new("RGB", (28, 28), colour) for colour in colours]
    pages[0].save(path, **(dict(save_all=True, append_images=pages[1:]) if path.suffix in (".pdf", ".tif") else {}))
    save.seconds += 10
    os.utime(path, (save.seconds, save.seconds))


save.seconds = 1_700_000_000


def spoil(path):
    """Cut an image, and return its whole content."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return whole


def check(built, documents):
    """Check that an index has the vectors and the metadata of its documents, and its folder no other files."""
    stored = stored_vectors(built)
    left_out = {item for item, _ in built.left_out}
    assert stored.keys() == {*documents.ids()} - left_out and len(built) == len(stored)
    for number, item in enumerate(documents.ids()):
        if item in left_out:
            continue
        np.testing.assert_array_equal(stored[item], vectors(content(documents[number])))
        expected = {key: value for key, value in documents.metadata(number).items() if key != "id" and value is not None}
        assert built.metadata(item) == expected
    named = {segment.entry.name for segment in built._segments}
    assert {path.name for path in built.folder.iterdir()} == {"manifest.json", "lock", *named}


def stored_vectors(built):
    """Return the stored vectors of each item, as float32."""
    items = {}
    for segment in built._segments:
        for ids, _, arrays in segment.items(100):
            levels = [arrays[file.path.name] for file in segment.levels]
            items |= dict(zip(ids, np.concatenate(levels, axis=1).astype(np.float32), strict=True))
    return items
