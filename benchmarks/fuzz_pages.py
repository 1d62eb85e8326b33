"""PDF files, against what pdfium draws of them."""

import io
import math
import random
import re
from pathlib import Path

import numpy as np
import pypdfium2
from fuzz_images import picture
from fuzz_kinds import damage

from metaembed_jax.data.documents import open_documents
from metaembed_jax.errors import UserError
from metaembed_jax.inputs.images import MAX_ASPECT_RATIO

PIXELS = 40_000  # of a drawn page
NUMBERS = (b"0", b"-1", b"1", b"1e9", b"0.001", b"65536", b"2147483647", b"-2147483648", b"99999999999999999999", b"1.5")
BOX = b"0 0 200 300"


def make_pdf(random: random.Random, folder: Path) -> bytes:
    """Write a PDF file, most often damaged."""
    data = random.choice((scanned, drawn, empty_pages))(random)
    for _ in range(random.choice((0, 1, 1, 2, 3))):
        if random.random() < 0.6:
            data = damage(random, data, scanned(random))
        else:
            spans = [match.span() for match in re.finditer(rb"-?[0-9.]+", data)]
            start, end = random.choice(spans)
            data = data[:start] + random.choice(NUMBERS) + data[end:]
    (folder / "file.pdf").write_bytes(data)
    return data


def check_pdf(folder: Path, _: bytes) -> str | None:
    """Compare up to three pages with those of pdfium."""
    file, reasons = folder / "file.pdf", []
    pages = open_documents(file).drawn_at(PIXELS)
    document = pypdfium2.PdfDocument(file)
    document.init_forms()
    assert len(document) == len(pages), f"{len(pages)} pages; pdfium finds {len(document)}"
    for number in range(min(len(pages), 3)):
        try:
            image = pages[number]["image"]
        except UserError as error:
            reasons.append(str(error))
            continue
        assert pages.describe(number)["image"] == image.size, f"page {number} is {image.size}; described otherwise"
        page = document[number]
        width, height = page.get_size()
        assert max(width, height) <= MAX_ASPECT_RATIO * min(width, height), f"page {number} is {width} x {height}"
        expected = np.asarray(page.render(scale=math.sqrt(PIXELS / (width * height))).to_pil().convert("RGB"))
        # pdfium draws some broken files otherwise at first than later in a process.
        again = np.asarray(pages.drawn_at(PIXELS)[number]["image"])
        is_equal = np.array_equal(np.asarray(image), expected) or np.array_equal(again, expected)
        assert is_equal, f"page {number} differs from that of pdfium"
        page.close()
    document.close()
    return reasons[0] if reasons else None


def scanned(random: random.Random) -> bytes:
    """Return a PDF file of pictures."""
    pages, file = [picture(random, random.choice(("L", "RGB", "1", "CMYK"))) for _ in range(random.randint(1, 3))], io.BytesIO()
    pages[0].save(file, "PDF", save_all=True, append_images=pages[1:])
    return file.getvalue()


def empty_pages(random: random.Random) -> bytes:
    """Return a PDF file of empty pages that are turned."""
    document, file = pypdfium2.PdfDocument.new(), io.BytesIO()
    for _ in range(random.randint(1, 4)):
        document.new_page(random.uniform(1, 900), random.uniform(1, 900)).set_rotation(random.choice((0, 90, 180, 270)))
    document.save(file)
    return file.getvalue()


def drawn(random: random.Random) -> bytes:
    """Return a PDF file with a line, a text and a form."""
    content = b"%d %d m %d %d l S BT /F1 %d Tf 20 20 Td (text) Tj ET" % tuple(random.randint(1, 200) for _ in range(5))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [5 0 R] >> >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [%s] /CropBox [%s] /Rotate %d /UserUnit %d /Contents 4 0 R /Annots [5 0 R] "
        b"/Resources << /Font << /F1 6 0 R >> >> >>"
        % (BOX, random.choice((BOX, b"10 10 90 90")), *random.choice(((0, 1), (90, 2)))),
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
        b"<< /Type /Annot /Subtype /Widget /FT /Tx /T (n) /V (v) /DA (/F1 24 Tf 0 g) /Rect [20 20 180 80] /F 4 /P 3 0 R >>",
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    data, offsets = b"%PDF-1.7\n", []
    for number, fields in enumerate(objects, 1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, fields)
    table = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    return data + table + b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, len(data))
