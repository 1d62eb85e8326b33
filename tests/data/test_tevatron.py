"""Queries with mined negatives and their corpus: both published forms, and errors of ids."""

import pytest

from metaembed_jax.data import sources
from metaembed_jax.data.sources import corpus, preparation, records, shards, tevatron
from metaembed_jax.errors import UserError
from tests.data.field_files import (
    inline,
    picture,
    tevatron_corpus,
    tevatron_queries,
    write_pairs,
    write_parquet,
    write_tevatron,
)


def prepare(directory, out, skips=0, workers=0):
    return sources.prepare_from("tevatron", directory, out, workers, skips)


def read(out, name="pages"):
    return list(records.open_split(out / name, preparation.VERSION, "train"))


def test_ids_become_pages(tmp_path):
    write_tevatron(tmp_path / "pages", tevatron_queries(7), tevatron_corpus(7))
    marker = prepare(tmp_path / "pages", tmp_path / "out")["pages"]
    for number, record in enumerate(read(tmp_path / "out")):
        assert record["query"] == {"text": f"where is {number}?"} and record["source"] == "pages"
        assert record["positive"] == {"image": picture(number)}
        nearest = [{"image": picture((number + step) % 7)} for step in range(1, 1 + tevatron.NEGATIVES)]
        assert record["negatives"] == nearest
    assert marker["rows"]["train"] == 7 and marker["negatives"] == 7 * tevatron.NEGATIVES
    assert not list((tmp_path / "out").rglob("corpus.*"))


def test_passages_texts_and_other_splits(tmp_path):
    queries = tevatron_queries(3, passages=True)
    queries[0]["negative_passages"] = [{"docid": "0"}, {"docid": "2"}]  # what answers a query is no negative of it
    write_pairs(tmp_path / "pages" / "train.jsonl", queries)
    write_pairs(tmp_path / "pages" / "test.jsonl", tevatron_queries(9, passages=True))
    write_pairs(tmp_path / "pages" / ".cache" / "train.jsonl", tevatron_queries(9, passages=True))
    documents = [{"docid": n, "text": f"Seite {n} ü"} for n in range(3)] + [{"docid": "unread", "text": ""}]
    write_pairs(tmp_path / "pages" / "corpus" / "corpus.jsonl", documents)
    prepare(tmp_path / "pages", tmp_path / "out")
    first, second, _ = read(tmp_path / "out")
    assert first["positive"] == {"text": "Seite 0 ü"} and first["negatives"] == [{"text": "Seite 2 ü"}]
    assert second["negatives"] == [{"text": "Seite 2 ü"}, {"text": "Seite 0 ü"}]


def test_queries_with_images_and_documents_of_both(tmp_path):
    queries = [row | {"query_text": None, "query_image": inline(picture(50))} for row in tevatron_queries(2)]
    write_tevatron(tmp_path / "pages", queries, [row | {"text": "said"} for row in tevatron_corpus(2)])
    prepare(tmp_path / "pages", tmp_path / "out")
    record = read(tmp_path / "out")[1]
    assert record["query"] == {"image": picture(50)} and record["positive"] == {"text": "said", "image": picture(1)}


def test_workers_and_a_resumed_job_write_the_same(tmp_path, monkeypatch):
    write_tevatron(tmp_path / "pages", tevatron_queries(40), tevatron_corpus(40))
    marker = prepare(tmp_path / "pages", tmp_path / "one")
    assert prepare(tmp_path / "pages", tmp_path / "two", workers=2) == marker
    assert read(tmp_path / "one") == read(tmp_path / "two")

    def killed(*arguments):
        raise KeyboardInterrupt

    copies = []
    write = corpus.Corpus._write
    monkeypatch.setattr(corpus.Corpus, "_write", lambda *arguments: copies.append(1) or write(*arguments))
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "pages", tmp_path / "three")
    assert prepare(tmp_path / "pages", tmp_path / "three") == marker and len(copies) == 1


QUERIES, CORPUS = "queries/train-00000-of-00001.parquet", "corpus/data/train-0000{}-of-00002.parquet"


@pytest.mark.parametrize(
    "table, row, change, message",
    [
        ("queries", 2, {"query_id": "0"}, f"{QUERIES}, row 2: the query_id '0' is taken by "),
        ("queries", 2, {"query_id": None}, f"{QUERIES}, row 2: query_id is None"),
        ("queries", 2, {"positive_document_ids": ["99"]}, f"{QUERIES}, row 2: names the document '99', which the corpus lacks"),
        ("queries", 2, {"negative_document_ids": ["99"]}, f"{QUERIES}, row 2: names the document '99', which the corpus lacks"),
        ("queries", 2, {"positive_document_ids": []}, f"{QUERIES}, row 2: positive_document_ids is empty"),
        ("queries", 2, {"positive_document_ids": None}, f"{QUERIES}, row 2: positive_document_ids is empty"),
        ("queries", 2, {"query_text": " "}, f"{QUERIES}, row 2: query_text is empty, and there is no query_image"),
        ("corpus", 3, {"docid": "3"}, f"{CORPUS.format(1)}, row 1: the docid '3' is taken by "),
        ("corpus", 3, {"docid": ""}, f"{CORPUS.format(1)}, row 1: docid is ''"),
        ("corpus", 2, {"image": None}, f"the document '1' (IN/{CORPUS.format(1)}, row 0) has neither text nor image"),
        (
            "corpus",
            2,
            {"image": inline(picture(0)[:2000])},
            f"document '1' (IN/{CORPUS.format(1)}, row 0): the image cannot be read",
        ),
    ],
)
def test_bad_rows(tmp_path, table, row, change, message):
    tables = {"queries": tevatron_queries(4), "corpus": tevatron_corpus(4)}
    tables[table][row] |= change
    write_tevatron(tmp_path / "pages", **tables)
    with pytest.raises(UserError) as caught:
        prepare(tmp_path / "pages", tmp_path / "out")
    error = str(caught.value).replace(str(tmp_path / "pages"), "IN")
    assert message in error and error.startswith("IN/")


def test_negatives_may_be_missing(tmp_path):
    queries = tevatron_queries(3)
    queries[0]["negative_document_ids"], queries[1]["negative_document_ids"] = None, []
    write_tevatron(tmp_path / "pages", queries, tevatron_corpus(3))
    prepare(tmp_path / "pages", tmp_path / "out")
    assert [len(record["negatives"]) for record in read(tmp_path / "out")] == [0, 0, 2]


def test_a_bad_page_can_be_skipped_with_the_rows_that_name_it(tmp_path):
    documents = tevatron_corpus(9)
    documents[0]["image"] = inline(b"no image")  # the page 8, which is near the queries 4 to 8
    write_tevatron(tmp_path / "pages", tevatron_queries(9), documents)
    marker = prepare(tmp_path / "pages", tmp_path / "out", skips=5)["pages"]
    assert len(marker["left_out"]) == 5 and [r["query"]["text"] for r in read(tmp_path / "out")] == [
        f"where is {n}?" for n in range(4)
    ]


def test_folders_without_a_set(tmp_path):
    with pytest.raises(UserError, match="queries .query_id, query_text.* are missing; --from is"):
        prepare(tmp_path / "none", tmp_path / "out")
    write_parquet(tmp_path / "a" / "q.parquet", tevatron_queries(2))
    with pytest.raises(UserError, match=r"documents \(docid, image, text\) are missing"):
        prepare(tmp_path, tmp_path / "out")
    write_parquet(tmp_path / "c" / "c.parquet", tevatron_corpus(2))
    write_parquet(tmp_path / "b" / "q.parquet", tevatron_queries(2))
    with pytest.raises(UserError, match=r"queries .* are in .*/a and .*/b; --from is a folder that holds one set"):
        prepare(tmp_path, tmp_path / "out")
    write_parquet(tmp_path / "x" / "q.parquet", [{"positive_document_ids": ["0"], "query_text": "q"}])
    write_parquet(tmp_path / "x" / "c.parquet", tevatron_corpus(2))
    with pytest.raises(UserError, match="q.parquet has the columns positive_document_ids, query_text; queries have query_id and"):
        prepare(tmp_path / "x", tmp_path / "out")
    (tmp_path / "x" / "z.parquet").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="z.parquet is not a readable Parquet file"):
        prepare(tmp_path / "x", tmp_path / "out")
