"""Small files in the formats of the field: the same columns and folders, with real images."""

import io
import json
import zipfile

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

MARK = "<|image_1|>"


def picture(number, kind="jpeg", height=56, width=84):
    """Return an encoded image of noise, different for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_parquet(path, rows, group=7):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)


def mmeb_rows(subset, count, kind):
    """`t2i`: a caption looks for its photo; `vqa`: photo and question for an answer; `it2it`: both on both sides."""
    images = [f"images/{subset}/Train/{number}.jpg" for number in range(count)]
    empty = [""] * count
    queries, query_images, texts, positives, negatives = {
        "t2i": ([f"Find: caption {n}\n" for n in range(count)], empty, [f"{MARK}\nRepresent the image.\n"] * count, images, empty),
        "vqa": (
            [f"{MARK}\nAnswer: question {n}?\n" for n in range(count)],
            images,
            [f"answer {n}" for n in range(count)],
            empty,
            [f"answer {n + 1}" for n in range(count)],
        ),
        "it2it": (
            [f"{MARK}\nLike this, {n}\n" for n in range(count)],
            images,
            [f"{MARK}\nThat, {n}\n" for n in range(count)],
            images[::-1],
            empty,
        ),
    }[kind]
    columns = dict(qry=queries, qry_image_path=query_images, pos_text=texts, pos_image_path=positives, neg_text=negatives)
    return [dict(zip(columns, row, strict=True)) | {"neg_image_path": ""} for row in zip(*columns.values(), strict=True)]


def write_mmeb(directory, subset="MSCOCO_t2i", count=20, kind="t2i", split="original", zipped=False):
    """One subset of MMEB-train, its images in a folder or in the archive they are delivered in."""
    write_parquet(directory / subset / f"{split}-00000-of-00001.parquet", mmeb_rows(subset, count, kind))
    pictures = {f"images/{subset}/Train/{number}.jpg": picture(number) for number in range(count)}
    if zipped:
        archive = directory / "images_zip" / f"{subset}.zip"
        archive.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(archive, "w") as file:
            for name, content in pictures.items():
                file.writestr(name, content)
    else:
        for name, content in pictures.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def write_colpali(directory, count=20):
    rows = [
        {
            "image": {"bytes": picture(1000 + number, "png", 112, 84), "path": None},
            "image_filename": f"{number}.png",
            "query": f"which page is {number}?",
            "answer": "['x']",
            "source": "docvqa",
        }
        for number in range(count)
    ]
    write_parquet(directory / "data" / "train-00000-of-00001.parquet", rows)


def inline(content):
    """An image as `datasets` stores it."""
    return {"bytes": content, "path": None}


def tevatron_queries(count=4, passages=False):
    """Query n is answered by page n; its negatives are all other pages, the next one first."""
    others = [[str((n + step) % count) for step in range(1, count)] for n in range(count)]
    if passages:
        listed = [[{"docid": docid, "title": "t", "text": "x"} for docid in ids] for ids in others]
        return [
            {"query_id": n, "query": f"where is {n}?", "positive_passages": [{"docid": str(n)}], "negative_passages": listed[n]}
            for n in range(count)
        ]
    return [
        {
            "query_id": str(n),
            "query_text": f"where is {n}?",
            "query_image": None,
            "positive_document_ids": [str(n)],
            "negative_document_ids": others[n],
            "source": "x",
        }
        for n in range(count)
    ]


def tevatron_corpus(count=4):
    return [{"docid": str(n), "image": inline(picture(n)), "text": None} for n in reversed(range(count))]


def write_tevatron(directory, queries, corpus):
    """A set with mined negatives and its corpus, in several files."""
    write_parquet(directory / "queries" / "train-00000-of-00001.parquet", queries, 3)
    half = len(corpus) // 2
    for number, rows in enumerate((corpus[:half], corpus[half:])):
        write_parquet(directory / "corpus" / "data" / f"train-0000{number}-of-00002.parquet", rows, 3)


def write_pairs(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


TARGETS = 3


def mmeb_test_rows(task, count, second):
    """`count` queries of one task, each with its own target first."""
    rows = []
    for number in range(count):
        others = [number, *(other for other in range(count) if other != number)][:TARGETS]
        pictured, text = task.kind != "t2i", "" if task.name == "NIGHTS" else f"text {number}"
        inst = f"{MARK} Do this: " if pictured else "Find this:"
        row = {"qry_img_path": f"{task.name}/{number}.jpg" if pictured else ""}
        row |= (
            {"qry_inst": inst, "qry_text": text} if second else {"qry_text": f"{inst}{text}\n" if pictured else f"{inst} {text}\n"}
        )
        if task.kind in ("i2t", "qa"):
            row |= {"tgt_text": [f"answer {other}" for other in others], "tgt_img_path": [""] * len(others)}
        else:
            caption = [f"caption {other}" if task.name in ("WebQA", "EDIS", "RefCOCO-Matching") else "" for other in others]
            texts = caption if second else [f"{MARK} This is it. {text}".strip() + "\n" for text in caption]
            row |= {"tgt_text": texts, "tgt_img_path": [f"{task.name}/{other}.jpg" for other in others]}
        rows.append(row | ({"tgt_inst": f"{MARK} This is it." if task.kind in ("t2i", "i2i") else ""} if second else {}))
    return rows


def write_mmeb_test(directory, tasks, count=4, second=False):
    """MMEB's evaluation files in one of both formats, with their images."""
    for task in tasks:
        write_parquet(directory / task.name / "test-00000-of-00001.parquet", mmeb_test_rows(task, count, second))
        folder = directory / "eval_images" / task.name
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number}.jpg").write_bytes(picture(number))
