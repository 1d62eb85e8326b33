"""Folders of images and PDF files, and tables, as documents: their order, their ids, and other files in such folders."""

import datetime
import decimal
import io
import multiprocessing
import os
import pickle
from pathlib import PurePath
from unicodedata import normalize

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from metaembed_jax import open_documents
from metaembed_jax.data import pdf
from metaembed_jax.data.folder_files import natural_order
from metaembed_jax.errors import UserError
from tests.data.field_files import inline, picture, write_pairs, write_parquet

A4 = b"0 0 595 842"


def pdf_file(*objects, trailer=b""):
    """A PDF file of these objects, the catalog first."""
    content, offsets = b"%PDF-1.7\n", []
    for number, fields in enumerate(objects, 1):
        offsets.append(len(content))
        content += b"%d 0 obj\n<< %s >>\nendobj\n" % (number, fields)
    table = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    end = b"trailer\n<< /Size %d /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF\n"
    return content + table + end % (len(objects) + 1, trailer, len(content))


def pdf_of(*boxes, trailer=b""):
    """A PDF file with an empty page of each MediaBox."""
    kids = b" ".join(b"%d 0 R" % (number + 3) for number in range(len(boxes)))
    pages = [b"/Type /Page /Parent 2 0 R /MediaBox [%s]" % box for box in boxes]
    tree = b"/Type /Pages /Kids [%s] /Count %d" % (kids, len(boxes))
    return pdf_file(b"/Type /Catalog /Pages 2 0 R", tree, *pages, trailer=trailer)


ENCRYPTED = pdf_of(
    A4, trailer=b"/Encrypt << /Filter /Standard /V 1 /R 2 /O <%s> /U <%s> /P -4 >> /ID [<00><00>]" % (b"41" * 32, b"42" * 32)
)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def scanned(colours, size=(85, 110)):
    """A PDF file with a page of each colour."""
    pages, content = [Image.new("RGB", size, colour) for colour in colours], io.BytesIO()
    pages[0].save(content, "pdf", save_all=True, append_images=pages[1:])
    return content.getvalue()


def ids(documents):
    return [documents.metadata(number)["id"] for number in range(len(documents))]


def test_a_folder_in_natural_order(tmp_path, capsys):
    write(tmp_path / "page10.png", picture(10, "png"))
    write(tmp_path / "page2.PNG", picture(2, "png"))
    write(tmp_path / "b" / "Übung.jpg", picture(3))
    write(tmp_path / "a" / "scan.pdf", scanned(["red", "lime", "blue"]))
    write(tmp_path / "a" / "scan.pdf.txt", b"text")
    write(tmp_path / "a" / "README", b"text")
    write(tmp_path / ".hidden" / "x.png", b"")
    write(tmp_path / "a" / ".DS_Store", b"")
    documents = open_documents(tmp_path)
    expected = ["a/scan.pdf#page=1", "a/scan.pdf#page=2", "a/scan.pdf#page=3", "b/Übung.jpg", "page2.PNG", "page10.png"]
    assert len(documents) == 6 and ids(documents) == expected
    assert documents.metadata(2) == {"id": "a/scan.pdf#page=3", "path": str(tmp_path / "a" / "scan.pdf"), "page": 3, "text": None}
    assert documents.metadata(5) == {"id": "page10.png", "path": str(tmp_path / "page10.png"), "page": None, "text": None}
    for number, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        page = documents[number]["image"]
        assert page.mode == "RGB" and np.abs(np.asarray(page).mean((0, 1)) - colour).max() < 3
    assert np.array_equal(documents[np.int64(5)]["image"], Image.open(tmp_path / "page10.png"))
    assert np.array_equal(documents[-1]["image"], documents[4:][1]["image"])
    with pytest.raises(IndexError):
        documents[6]
    assert capsys.readouterr().out == f"{tmp_path}: not read: files with the ending .txt (1), files without an ending (1)\n"


def test_natural_order_is_total():
    names = [
        "1.png",
        "01.png",
        "2/a.png",
        "2.png",
        "10.png",
        "a.png",
        "A.png",
        "a1b2.png",
        "a1b10.png",
        "a١.png",
        "a²",
        "ab/1",
        "é",
    ]
    paths = [PurePath(name) for name in names]
    ordered = sorted(paths, key=natural_order)
    assert sorted(paths, key=natural_order) == ordered
    ranks = {str(path): rank for rank, path in enumerate(ordered)}
    assert ranks["2.png"] < ranks["10.png"] < ranks["a.png"] and ranks["a1b2.png"] < ranks["a1b10.png"]


@pytest.mark.parametrize("box", [A4, b"0 0 842 595", b"0 0 14400 14400", b"0 0 3 5", b"0 0 1e30 1e30", b"0 0 0 0", b"0 0 -5 -5"])
def test_pages_are_drawn_at_a_bounded_size(tmp_path, box):
    write(tmp_path / "a.pdf", pdf_of(box))
    width, height = open_documents(tmp_path)[0]["image"].size
    assert 0.99 * pdf.PAGE_PIXELS < width * height < 1.01 * pdf.PAGE_PIXELS
    if box == A4:
        assert abs(width / height - 595 / 842) < 0.002


def test_pages_are_drawn_at_what_a_model_reads(tmp_path, monkeypatch):
    write(tmp_path / "a.pdf", pdf_of(A4, b"0 0 842 595"))
    write(tmp_path / "b.png", picture(0, "png"))
    documents = open_documents(tmp_path)
    drawn = pickle.loads(pickle.dumps(documents.drawn_at(50_000)))
    sizes = [drawn[number]["image"].size for number in range(3)]
    assert sizes == [drawn.describe(number)["image"] for number in range(3)]
    assert all(50_000 <= width * height < 51_000 for width, height in sizes[:2]) and sizes[2] == (84, 56)
    assert documents[0]["image"].width > 2 * sizes[0][0]
    monkeypatch.setattr(pdf, "PIXEL_BYTES", 4 << 20)
    monkeypatch.setenv("METAEMBED_IMAGE_MIB", "40000")
    width, height = drawn.describe(0)["image"]
    assert 10_000 <= width * height < 10_300


def test_text_in_a_form_is_drawn(tmp_path):
    font = b"/DR << /Font << /Helv 5 0 R >> >>"
    field = b"/Type /Annot /Subtype /Widget /FT /Tx /T (name) /V (hello) /DA (/Helv 24 Tf 0 g) /Rect [20 20 180 80] /F 4 /P 3 0 R"
    content = pdf_file(
        b"/Type /Catalog /Pages 2 0 R /AcroForm << /Fields [4 0 R] %s >>" % font,
        b"/Type /Pages /Kids [3 0 R] /Count 1",
        b"/Type /Page /Parent 2 0 R /MediaBox [0 0 200 100] /Annots [4 0 R]",
        field,
        b"/Type /Font /Subtype /Type1 /BaseFont /Helvetica",
    )
    write(tmp_path / "form.pdf", content)
    assert (np.asarray(open_documents(tmp_path)[0]["image"]) < 128).any()


def test_pages_that_cannot_be_drawn(tmp_path):
    write(tmp_path / "a.pdf", pdf_of(A4, b"0 0 1 1000000"))
    documents = open_documents(tmp_path)
    with pytest.raises(UserError, match=r"a.pdf, page 2 is 1 x 1e\+06 points; one side is over 200 times the other"):
        documents[1]
    write(tmp_path / "a.pdf", pdf_of(A4).replace(b"/Count 1", b"/Count 2"))
    documents = open_documents(tmp_path)
    with pytest.raises(UserError, match="a.pdf, page 2 cannot be drawn"):
        documents[1]


@pytest.mark.parametrize(
    "content, message",
    [
        (ENCRYPTED, "is encrypted"),
        (pdf_of(), "has no pages"),
        (b"", "is not a readable PDF file"),
        (scanned(["red"])[:300], "is not a readable PDF file"),
        (picture(0, "png"), "is not a readable PDF file"),
    ],
    ids=["encrypted", "no pages", "empty", "cut", "png"],
)
def test_pdf_files_that_cannot_be_read_are_an_error_at_once(tmp_path, content, message):
    write(tmp_path / "a.png", picture(0, "png"))
    write(tmp_path / "b.pdf", content)
    with pytest.raises(UserError, match=f"b.pdf {message}"):
        open_documents(tmp_path)
    write(tmp_path / "c.pdf", content)
    with pytest.raises(UserError, match=f"b.pdf {message}.*; 2 documents so far cannot be read; --skip=2 leaves out as many"):
        open_documents(tmp_path, skip=1)
    documents = open_documents(tmp_path, skip=2)
    assert ids(documents) == documents.ids() == ["a.png"] and [left_out.id for left_out in documents.left_out] == ["b.pdf", "c.pdf"]
    assert message in documents.left_out[1].reason and len(documents.stamps()) == 1
    with pytest.raises(UserError, match="skip=-1: expected"):
        open_documents(tmp_path, skip=-1)


def test_broken_images_are_named_by_their_file(tmp_path):
    write(tmp_path / "a.png", picture(0, "png")[:500])
    with pytest.raises(UserError, match=f"{tmp_path}/a.png: the image cannot be read"):
        open_documents(tmp_path)[0]
    assert open_documents(tmp_path).item_name(0) == f"{tmp_path}/a.png"


def test_links_and_pipes(tmp_path, capsys):
    write(tmp_path / "in" / "a.png", picture(0, "png"))
    write(tmp_path / "out" / "secret.png", picture(1, "png"))
    (tmp_path / "in" / "b.png").symlink_to("a.png")
    (tmp_path / "in" / "c.png").symlink_to(tmp_path / "out" / "secret.png")
    (tmp_path / "in" / "d.png").symlink_to("nowhere.png")
    (tmp_path / "in" / "folder").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    os.mkfifo(tmp_path / "in" / "e.pdf")
    assert ids(open_documents(tmp_path / "in")) == ["a.png", "b.png"]
    kinds = "links and pipes that lead to no file (2), links out of the folder (1), links to folders (2)"
    assert capsys.readouterr().out == f"{tmp_path / 'in'}: not read: {kinds}\n"


def test_pages_of_a_tiff_are_documents(tmp_path):
    from PIL import TiffImagePlugin

    colours = ["red", "lime", "blue"]
    pages = [Image.new("RGB", (60 + number, 84), colour) for number, colour in enumerate(colours)]
    reduced = TiffImagePlugin.ImageFileDirectory_v2()
    reduced[254] = 1
    thumbnail = Image.new("RGB", (6, 8), "white")
    thumbnail.encoderinfo = {"tiffinfo": reduced}
    pages[0].save(tmp_path / "fax.TIF", save_all=True, append_images=[*pages[1:], thumbnail])
    pages[1].save(tmp_path / "photo.tif")
    write(tmp_path / "sick.tif", (tmp_path / "photo.tif").read_bytes()[:9])
    documents = pickle.loads(pickle.dumps(open_documents(tmp_path)))
    assert ids(documents) == ["fax.TIF#page=1", "fax.TIF#page=2", "fax.TIF#page=3", "photo.tif", "sick.tif"]
    for number, page in enumerate([*pages, pages[1]]):
        assert np.array_equal(documents[number]["image"], page) and documents.describe(number)["image"] == page.size
    assert documents.item_name(1) == f"{tmp_path}/fax.TIF, page 2" and documents.metadata(1)["page"] == 2
    with pytest.raises(UserError, match="sick.tif: the image cannot be read"):
        documents[4]


def test_unread_pages_of_tiffs_in_a_table_are_counted(tmp_path):
    pages = [Image.new("RGB", (60, 84), colour) for colour in ("red", "lime", "blue")]
    pages[0].save(tmp_path / "fax.tif", save_all=True, append_images=pages[1:])
    pages[1].save(tmp_path / "photo.tif")
    images = ["fax.tif", "photo.tif", "fax.tif"]
    write_pairs(tmp_path / "items.jsonl", [{"text": "scan", "image": image} for image in images])
    documents = open_documents(tmp_path / "items.jsonl")
    assert documents.unread_pages == 0
    first, *_ = [documents[number] for number in (0, 1, 2, 0)]
    assert documents.unread_pages == 4 and first["image"] == (tmp_path / "fax.tif").read_bytes()
    assert open_documents(tmp_path / "fax.tif").unread_pages == 0


def test_every_ending_of_a_folder_is_read_or_left_out(tmp_path, capsys):
    for ending in ("bmp", "gif", "jfif", "jp2", "pgm", "ppm", "webp", "ico", "tga"):
        image = Image.new("L" if ending == "pgm" else "RGB", (32, 32), "gray")
        image.save(tmp_path / f"a.{ending}", {"pgm": "PPM", "jfif": "JPEG", "jp2": "JPEG2000"}.get(ending))
    write(tmp_path / "a.heic", b"")
    documents = open_documents(tmp_path)
    assert ids(documents) == ["a.bmp", "a.gif", "a.jfif", "a.jp2", "a.pgm", "a.ppm", "a.webp"]
    for item in documents:
        assert item["image"].size == (32, 32) and np.abs(np.asarray(item["image"]) - 128.0).max() < 3
    endings = [f"files with the ending .{ending} (1)" for ending in ("heic", "ico", "tga")]
    assert capsys.readouterr().out == f"{tmp_path}: not read: {', '.join(endings)}\n"


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        open_documents(tmp_path / "none")
    with pytest.raises(UserError, match="has no images or PDF files in it"):
        open_documents(tmp_path)
    write(tmp_path / "a.docx", b"")
    with pytest.raises(UserError, match="a.docx: expected an image, PDF file or table"):
        open_documents(tmp_path / "a.docx")


def test_one_file_alone(tmp_path):
    write(tmp_path / "x" / "a.pdf", scanned(["red", "blue"]))
    write(tmp_path / "x" / "b.png", picture(0, "png"))
    assert ids(open_documents(tmp_path / "x" / "a.pdf")) == ["a.pdf#page=1", "a.pdf#page=2"]
    assert ids(open_documents(str(tmp_path / "x" / "b.png"))) == ["b.png"]


def _read(documents, numbers, answers):
    answers.put({number: np.asarray(documents[number]["image"]).tobytes() for number in numbers})


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_processes_read_at_the_same_time(tmp_path, method):
    """The files are large, so that a shared file position would show."""
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        pages, content = [Image.fromarray(random.integers(0, 256, (300, 200, 3), np.uint8)) for _ in range(6)], io.BytesIO()
        pages[0].save(content, "pdf", save_all=True, append_images=pages[1:])
        write(tmp_path / f"{name}.pdf", content.getvalue())
    documents = open_documents(tmp_path)
    expected = {number: np.asarray(documents[number]["image"]).tobytes() for number in range(12)}
    assert len(set(expected.values())) == 12
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    others = [context.Process(target=_read, args=(documents, range(first, 12, 2), answers)) for first in (0, 1)]
    for process in others:
        process.start()
    read = {number: np.asarray(documents[number]["image"]).tobytes() for number in reversed(range(12))}
    for _ in others:
        read |= {number: content for number, content in answers.get(timeout=60).items() if expected[number] == content}
    for process in others:
        process.join()
    assert read == expected


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_table(tmp_path, ending):
    write(tmp_path / "a.png", picture(0, "png"))
    rows = [{"id": "x", "text": "Grün", "image": None}, {"id": "7", "text": "", "image": "a.png"}]
    rows += [{"id": "z", "text": "both", "image": "a.png"}]
    (write_pairs if ending == "jsonl" else write_parquet)(tmp_path / f"items.{ending}", rows)
    documents = pickle.loads(pickle.dumps(open_documents(tmp_path / f"items.{ending}")))
    image = picture(0, "png")
    assert list(documents) == [{"text": "Grün"}, {"image": image}, {"text": "both", "image": image}]
    assert ids(documents) == ["x", "7", "z"]
    assert [documents.metadata(number)["text"] for number in range(3)] == ["Grün", None, "both"]
    assert [documents.metadata(number)["path"] for number in range(3)] == [None, str(tmp_path / "a.png"), str(tmp_path / "a.png")]


def test_tables_without_ids_and_with_images_inline(tmp_path):
    write_parquet(tmp_path / "items.parquet", [{"image": inline(picture(number))} for number in range(20)])
    documents = open_documents(tmp_path / "items.parquet")
    assert ids(documents) == [str(number) for number in range(20)]
    assert documents[13] == {"image": picture(13)} and documents.metadata(13)["path"] is None


@pytest.mark.parametrize("ending", ["JSONL", "PARQUET"])
def test_further_columns_are_metadata_and_the_index_of_pandas_is_not_read(tmp_path, capsys, ending):
    rows = [{"text": f"text {n}", "price": n, "page": 7, "__index_level_0__": n} for n in range(3)]
    (write_pairs if ending == "JSONL" else write_parquet)(tmp_path / f"ITEMS.{ending}", rows)
    documents = open_documents(tmp_path / f"ITEMS.{ending}")
    assert list(documents) == [{"text": f"text {n}"} for n in range(3)]
    assert documents.metadata(2) == {"id": "2", "path": None, "page": 7, "text": "text 2", "price": 2}
    expected = f"{tmp_path}/ITEMS.{ending}: columns kept as metadata, not encoded: page, price; read: id, image, text\n"
    assert capsys.readouterr().out == expected


def test_names_of_columns_that_are_not_text(tmp_path):
    write_parquet(tmp_path / "items.parquet", [{"text": "a", "price": 3}])
    write(tmp_path / "broken.parquet", (tmp_path / "items.parquet").read_bytes().replace(b"price", b"pri\xffe"))
    with pytest.raises(UserError, match="broken.parquet is not a readable Parquet file"):
        open_documents(tmp_path / "broken.parquet")


@pytest.mark.parametrize("in_table, on_disk", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_found_in_either_form_of_unicode(tmp_path, in_table, on_disk):
    name = "Übung/é.png"
    write(tmp_path / normalize(on_disk, name), picture(0, "png"))
    write_pairs(tmp_path / "items.jsonl", [{"image": normalize(in_table, name)}])
    assert open_documents(tmp_path / "items.jsonl")[0] == {"image": picture(0, "png")}


def test_images_in_structs_as_datasets_writes_them(tmp_path):
    write(tmp_path / "in" / "a.png", picture(0, "png"))
    images = [{"bytes": None, "path": "in/a.png"}, {"bytes": picture(1), "path": "gone.png"}, {"bytes": None, "path": None}, None]
    write_parquet(tmp_path / "items.parquet", [{"text": "caption", "image": image} for image in images])
    documents = open_documents(tmp_path / "items.parquet")
    assert [document.get("image") for document in documents] == [picture(0, "png"), picture(1), None, None]
    paths = [documents.metadata(number)["path"] for number in range(4)]
    assert paths == [str(tmp_path / "in" / "a.png"), None, None, None]
    write_parquet(tmp_path / "items.parquet", [{"text": "caption", "image": {"bytes": b"", "path": "in/a.png"}}])
    with pytest.raises(UserError, match="row 0: image: the image has no bytes"):
        open_documents(tmp_path / "items.parquet")[0]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"id": "x", "text": "a"}, {"id": "y", "text": "b"}, {"id": "x", "text": "c"}], "row 2: the id 'x' is taken by .*row 0"),
        ([{"id": 1, "text": "a"}, {"id": "1", "text": "b"}], "row 1: the id '1' is taken by .*row 0"),
        ([{"id": "x", "text": "a"}, {"text": "b"}], "row 1: id is None"),
        ([{"id": "x"}], "items.jsonl has the columns id; expected text or image"),
        ([{"text": "a"}, {"text": "b", "id": "x"}], "row 1: has an id, which the first row lacks"),
        ([{"text": "a"}, {"text": ""}], "row 1: document has neither text nor image"),
        ([{"text": "a"}, {"image": "none.png"}], "row 1: image: the image .*none.png is missing"),
        ([{"text": "a"}, {"image": "../a.png"}], "row 1: image: the image path '../a.png' leads out of"),
        ([{"text": "a"}, {"text": ["b"]}], "row 1: document: expected a string, not list"),
        ([{"text": "a"}, {"text": "b", "image": 0}], "row 1: image is 0; expected the path of an image, its bytes"),
        ([{"text": "a"}, {"text": "b", "image": False}], "row 1: image is False"),
        ([{"text": "a"}, {"text": "b", "image": []}], r"row 1: image is \[\]"),
        ([{"text": "a"}, {"text": "b", "image": {"path": "no.png"}}], "row 1: image: the image .*no.png is missing"),
        ([{"text": "a"}, {"text": "b", "image": {"bytes": None, "path": "../a.png"}}], "row 1: image: .* leads out of"),
        ([{"text": "a"}, {"text": "b", "image": "empty.png"}], "row 1: image: .*empty.png: the image has no bytes"),
    ],
)
def test_bad_tables(tmp_path, rows, message):
    (tmp_path / "empty.png").touch()
    write_pairs(tmp_path / "items.jsonl", rows)
    with pytest.raises(UserError, match=message):
        list(open_documents(tmp_path / "items.jsonl"))


def test_a_folder_describes_its_images_and_pages(tmp_path):
    import pypdfium2

    document = pypdfium2.PdfDocument.new()
    for size in ((595.3, 841.9), (100, 37.2), (841.9, 595.3)):
        document.new_page(*size).set_rotation(90)
    document.save(tmp_path / "a.pdf")
    Image.new("RGB", (30, 20)).save(tmp_path / "b.png")
    documents = open_documents(tmp_path)
    assert len(documents) == 4
    assert [documents.describe(n)["image"] for n in range(4)] == [documents[n]["image"].size for n in range(4)]


def test_values_of_other_columns_as_json(tmp_path):
    row = {"text": "a", "path": 5, "page": [1, 2], "day": datetime.date(2026, 11, 28), "price": decimal.Decimal("1.50")}
    table = pyarrow.Table.from_pylist([row | {"nan": float("nan"), "bytes": b"x", "nested": {"at": datetime.time(12, 30)}}])
    parquet.write_table(table, tmp_path / "items.parquet")
    metadata = open_documents(tmp_path / "items.parquet").metadata(0)
    kept = {"path": 5, "page": [1, 2], "day": "2026-11-28", "price": "1.50", "nested": {"at": "12:30:00"}}
    assert {name: value for name, value in metadata.items() if value is not None} == {"id": "0", "text": "a"} | kept


def test_endings_are_printed_on_one_short_line(tmp_path, capsys):
    write(tmp_path / "a.png", picture(0, "png"))
    for number in range(30):
        write(tmp_path / f"x.\x1b[31m{number}\nerror", b"")
    open_documents(tmp_path)
    output = capsys.readouterr().out
    assert len(output.splitlines()) == 1 and "\x1b" not in output and "files with other endings (20)" in output
