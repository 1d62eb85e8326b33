"""The page of an evaluation, read back by an HTML parser."""

import io

import numpy as np
import pytest
from PIL import Image

from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.failures import FailedQuery
from metaembed_jax.evaluation.html_report import LONGEST, SIDE, shortened, write_html
from metaembed_jax.evaluation.tables import Table, as_text
from tests.evaluation.parsed_page import Page

TABLE = Table("text→image: 2 queries", "R@1 in percent", ("budget", "R@1"), [[("1:1", "12.5"), ("<b>", "&")], [("4:8", "25.0")]])
FACTS = {"config": "tiny <script>", "checkpoint": "step 8"}


def noise(height, width, kind="png", **options):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)).save(file, kind, **options)
    return file.getvalue()


PICTURE = noise(30, 60)


def write(path, failures, tables=(TABLE,)):
    write_html(path, "tiny & <icons>", tables, PICTURE, failures, FACTS)
    return Page(path.read_text(encoding="utf-8"))


def failure(query, right=(({"text": "right"}, 1.0),), above=(({"text": "wrong"}, 2.0),), origin="icons, query 3"):
    return FailedQuery(origin=origin, query=query, rank=1233, among=2000, right=list(right), above=list(above))


def test_contents_of_a_page(tmp_path):
    both = {"text": "a red car", "image": noise(40, 90, "jpeg", comment=b"secret")}
    right = [({"image": noise(700, 300)}, 1.5), ({"text": "or this"}, 1.0)]
    page = write(tmp_path / "new" / "report.html", [failure(both, right), failure({"text": "only text"})])
    assert page.all("html")[0][0]["lang"] == "en" and page.all("title") == [({}, "tiny & <icons>")] and not page.all("script")
    assert page.all("caption") == [({}, "text→image: 2 queriesR@1 in percent")]
    assert [text for attributes, text in page.all("th") if attributes["scope"] == "row"] == ["1:1", "<b>", "4:8"]
    assert [text for _, text in page.all("td")] == ["12.5", "&", "25.0"] and len(page.all("tbody")) == 2
    assert "text-align: right" in page.all("style")[0][1]
    plot, query, right = page.images()
    assert plot[1].tobytes() == Image.open(io.BytesIO(PICTURE)).tobytes() and all(alt for alt, _ in (plot, query, right))
    assert query[1].size == (90, 40) and right[1].size == (round(300 * SIDE / 700), SIDE) and right[1].mode == "RGB"
    assert "comment" not in query[1].info
    first, second = page.all("article")
    assert "Rank 1,234 of 2,000" in first[1] and "icons, query 3" in first[1] and "a red car" in first[1]
    assert "right · score 1.500" in first[1] and first[1].index("or this") < first[1].index("wrong")
    assert "only text" in second[1]
    assert "tiny <script>" in page.all("footer")[0][1]


def test_notes_are_below_the_table_on_the_page_and_in_the_terminal(tmp_path):
    noted = TABLE._replace(notes=["left out: <i>", "and this"])
    page = write(tmp_path / "report.html", [], [noted, TABLE])
    assert page.all("small") == [({}, "left out: <i>"), ({}, "and this")] and len(page.all("table")) == 2
    assert as_text(noted) == as_text(TABLE) + "\nleft out: <i>\nand this"
    assert as_text(noted._replace(bodies=[[]])).splitlines() == [TABLE.title, "budget  R@1", *noted.notes]


def test_nothing_to_plot(tmp_path):
    write_html(tmp_path / "report.html", "none", [TABLE], None, [], FACTS)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not page.all("img") and not page.all("figure") and page.all("table")


def test_nothing_missed(tmp_path):
    page = write(tmp_path / "report.html", [])
    assert not page.all("article") and "every query found what it looked for" in page.all("p")[-1][1] and len(page.images()) == 1


HOSTILE = [
    "</p></article><script>alert(1)</script><img src=x onerror=alert(1)>",
    "\" onload='x' ' `",
    "שלום <b>‮evil</b>",
    "&lt;script&gt; &amp;#60;",
    "<!-- <![CDATA[ ]]> -->",
    "a\u0000b\ud800c\u0085d\x1b[31m",
    "e\u0301" * 5,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_text(tmp_path, text):
    failed = failure({"text": text}, [({"text": text}, 1.0)], [({"text": text}, 2.0)], origin=text)
    table = Table(text, text, [text, text], [[[text, text]]])
    page = write(tmp_path / "report.html", [failed], [table])
    tags = {tag for tag, *_ in page.elements}
    assert not tags & {"script", "b"} and len(page.all("img")) == 1
    assert not any(name.startswith("on") for _, attributes, _, _ in page.elements for name in attributes)
    shown = [text for attributes, text in page.all("p") if attributes]
    assert shown == [shortened(text)] * 3 and all(attributes == {"lang": "", "dir": "auto"} for attributes, _ in page.all("p")[1:])


def test_long_texts_are_cut():
    assert shortened("  two \n\t words ") == "two words" and shortened("x" * LONGEST) == "x" * LONGEST
    assert shortened("x" * 10**6) == "x" * LONGEST + "…"
    words = shortened("seven77 " * 100)
    assert words == ("seven77 " * 100)[: LONGEST - LONGEST % 8 - 1] + "…"
    assert shortened("\ud800\x00") == "\ufffd\ufffd"


def test_the_same_bytes_for_the_same_results(tmp_path):
    opened = Image.open(io.BytesIO(noise(300, 400)))
    failures = [failure({"image": opened, "text": "x"})]
    write(tmp_path / "1.html", failures)
    assert opened.size == (400, 300)  # it is the caller's
    write(tmp_path / "2.html", failures)
    assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()


def test_images_are_bounded(tmp_path):
    huge = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(huge, "png")
    with pytest.raises(UserError, match="worst query 1: found, 1: the image is 12000x12000 pixels"):
        write(tmp_path / "report.html", [failure({"text": "x"}, above=[({"image": huge.getvalue()}, 1.0)])])
    assert not any(tmp_path.iterdir())
    page = write(tmp_path / "report.html", [failure({"image": noise(2, 4000)})])
    assert page.images()[1][1].size == (SIDE, 1)
