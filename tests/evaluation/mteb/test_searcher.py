"""The model in mteb's hands: its mock tasks, its figures against our own metrics, and what is encoded when."""

import numpy as np
import pytest

mteb = pytest.importorskip("mteb")

from datasets import Dataset, Features, Image, Value  # noqa: E402
from mteb._create_dataloaders import _retrieval_texts  # noqa: E402
from mteb.types import PromptType  # noqa: E402

from metaembed_jax.errors import UserError  # noqa: E402
from metaembed_jax.evaluation import metrics  # noqa: E402
from metaembed_jax.evaluation.mteb.items import TaskItems  # noqa: E402
from metaembed_jax.evaluation.mteb.searcher import Searcher  # noqa: E402
from metaembed_jax.late_interaction.maxsim import maxsim  # noqa: E402
from metaembed_jax.late_interaction.prefixes import unit_prefix  # noqa: E402
from tests.evaluation.mteb.pages import Pages, picture, table  # noqa: E402


@pytest.fixture(scope="module")
def pages():
    task = Pages()
    task.load_data()
    return task


@pytest.fixture(scope="module")
def vectors(model, pages):
    """The vectors of the English questions that have an answer, and of the pages."""
    data = pages.dataset["english"]["test"]
    return model.encode_query(data["queries"]["text"][:7]), model.encode_document(list(data["corpus"]["image"]))


def evaluate(task, searcher, subset="english"):
    return task.evaluate(searcher, "test", subsets_to_run=[subset], encode_kwargs={})[subset]


def search(task, searcher, **options):
    """{question: {page: score}} of the English part."""
    data = task.dataset["english"]["test"]
    searcher.index(data["corpus"], task_metadata=task.metadata)
    return searcher.search(data["queries"].select(range(7)), task_metadata=task.metadata, **{"top_k": 12} | options)


def matrix(results):
    return np.array([[results[f"q{q}"].get(f"p{n}", -np.inf) for n in range(12)] for q in range(7)])


def test_mteb_accepts_it(model):
    mocked = mteb.mock_run(Searcher(model, (2, 4)))
    passed = {name for name, status in mocked.items() if status is not None}
    assert mocked.all_passed, mocked.to_markdown()
    assert passed >= {
        "MockRetrievalTask",
        "MockRerankingTask",
        "MockInstructionRetrieval",
        "MockRetrievalDialogTask",
        "MockAny2AnyRetrievalT2I",
        "MockAny2AnyRetrievalI2T",
        "MockVisionCentricQA",
    }


def test_it_says_what_it_is(model):
    meta = Searcher(model, [(1, 1, 10), (16, 64)], name="small", revision="abc").mteb_model_meta
    assert (meta.name, meta.revision, meta.framework) == ("metaembed-jax/small", "abc", ["JAX"])
    assert meta.similarity_fn_name.value == "MaxSim" and meta.model_type == ["late-interaction"]
    assert meta.modalities == ["text", "image"] and meta.experiment_kwargs == {"budget": "1:1:10>16:64"}


@pytest.mark.parametrize("budget", [(1, 1), (16, 64)])
def test_mteb_finds_what_our_metrics_find(model, pages, vectors, budget):
    result = evaluate(pages, Searcher(model, budget))
    scores = np.asarray(maxsim(*vectors, budget=budget))
    assert len(np.unique(scores)) == scores.size
    judged = pages.dataset["english"]["test"]["relevant_docs"]
    grades = np.array([[judged[f"q{q}"].get(f"p{n}", 0) for n in range(12)] for q in range(7)])
    assert set(grades.ravel()) == {0, 1, 2, 3} and "q7" not in judged
    gold = metrics.gold_of(scores, grades)
    ours = {f"ndcg_cut_{k}": metrics.ndcg_at(gold, k) for k in (5, 10)}
    ours |= {f"success_{k}": metrics.hit_at(gold, k) for k in (1, 3)} | {"P_1": metrics.hit_at(gold, 1)}
    for measure, values in ours.items():
        theirs = [pages.per_query["english"][f"q{q}"][measure] for q in range(7)]
        np.testing.assert_allclose(values, theirs, rtol=0, atol=1e-6)
        assert 0 < values.mean() < 1
    assert result["main_score"] == result["ndcg_at_5"] == pytest.approx(ours["ndcg_cut_5"].mean(), abs=5.1e-6)  # five digits


def test_scores_are_those_of_sentence_transformers(model, pages, vectors):
    util = pytest.importorskip("sentence_transformers").util
    for budget in ((1, 1), (4, 8), (16, 64), (4, 8, 5)):
        query, page = (
            unit_prefix(vectors_NRD[:, :count], budget[2] if len(budget) > 2 else 0)
            for vectors_NRD, count in zip(vectors, budget[:2], strict=True)
        )
        theirs = util.maxsim(list(query), list(page)).numpy()
        np.testing.assert_allclose(matrix(search(pages, Searcher(model, budget))), theirs, atol=1e-5)


def test_stages(model, pages):
    searcher = Searcher(model)
    whole, first = search(pages, searcher), search(pages, searcher.at((1, 1)))
    assert search(pages, searcher.at([(1, 1, 12), (16, 64)])) == whole
    few = search(pages, searcher.at([(1, 1, 5), (16, 64)]))
    for query, results in few.items():
        survivors = sorted(first[query], key=first[query].get)[-5:]
        assert results == {page: whole[query][page] for page in survivors}
    assert {query: list(results)[:3] for query, results in few.items()} != {
        query: list(results)[:3] for query, results in whole.items()
    }
    with pytest.raises(UserError, match="goes beyond"):
        searcher.at((4, 8)).at((17, 64))


def test_the_best_and_what_is_asked_about(model, pages):
    searcher = Searcher(model)
    whole = search(pages, searcher)
    best = search(pages, searcher, top_k=3)
    assert best == {query: dict(sorted(results.items(), key=lambda pair: -pair[1])[:3]) for query, results in whole.items()}
    some = {f"q{q}": [f"p{n}" for n in range(q, q + 4)] for q in range(6)}  # of q6 nothing is asked
    for stages in (16, 64), [(16, 64, 6), (16, 64)]:
        results = search(pages, searcher.at(stages), top_ranked=some)
        assert results == {
            query: {page: whole[query][page] for page in sorted(some.get(query, ()), key=whole[query].get)[::-1]} for query in whole
        }
    assert list(search(pages, searcher, top_ranked=some, top_k=2)["q0"]) == sorted(some["q0"], key=whole["q0"].get)[:1:-1]


def test_what_was_encoded_is_not_encoded_again(model, pages, monkeypatch):
    encoded = []

    def encode_share(items, side, *, encode=model.encode_share, **options):
        encoded.append((side, len(items), options["budget"]))
        return encode(items, side, **options)

    monkeypatch.setattr(model, "encode_share", encode_share)
    searcher = Searcher(model, (4, 8))
    for subset in ("english", "french"):
        for budget in ((1, 1), (4, 8), [(1, 1, 3), (2, 4)]):
            evaluate(pages, searcher.at(budget), subset)
    pages_once, questions = ("document", 12, 8), ("query", 7, 4)
    assert encoded == [pages_once, questions, questions]  # the French pages are the English ones


def test_pages_are_decoded_by_us(model, pages):
    items = TaskItems(pages.dataset["english"]["test"]["corpus"], "document", ["image"], "pages")
    assert all(isinstance(item["image"], bytes) for item in items) and items[0].keys() == {"image"}
    vectors = model.encode_document(items)
    np.testing.assert_array_equal(
        vectors, model.encode_document([{"image": picture(n, ("RGB", "RGBA", "L", "P")[n % 4])} for n in range(12)])
    )


@pytest.mark.parametrize(
    "columns, side",
    [
        ({"text": ["a b ", " c"]}, "document"),
        ({"text": ["a b ", " c"], "title": ["t", ""]}, "document"),
        ({"text": ["", "c"], "title": ["t", "ü"]}, "document"),
        ({"text": ["a ", "c"]}, "query"),
        ({"text": ["a ", "c"], "instruction": ["do", None]}, "query"),
        ({"text": [[{"role": "user", "content": "x"}, {"role": "bot", "content": "y"}]] * 2}, "query"),
        ({"text": [[{"role": "user", "content": "x"}]] * 2, "instruction": ["do", "so"]}, "query"),
        ({"text": [["x", "y"], ["z"]]}, "query"),
    ],
)
@pytest.mark.filterwarnings("ignore:Conversations are a list")
def test_texts_are_those_of_mteb(columns, side):
    rows = Dataset.from_dict({"id": ["1", "2"], **columns})
    expected = _retrieval_texts(rows, {"query": PromptType.query, "document": PromptType.document}[side])
    assert [item["text"] for item in TaskItems(rows, side, ["text"], "rows")] == list(expected)


def test_only_what_the_task_gives_counts():
    rows = table([picture(0), None], id=["1", "2"], text=["a", None])
    assert [item.keys() for item in TaskItems(rows, "document", ["text", "image"], "rows")] == [{"text", "image"}, set()]
    assert [item.keys() for item in TaskItems(rows, "document", ["image"], "rows")] == [{"image"}, set()]
    prints = {TaskItems(rows, "document", names, "rows").fingerprint() for names in (["text"], ["image"], ["text", "image"])}
    assert len(prints) == 3


def test_images_in_files(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(3))
    images = [{"bytes": None, "path": str(tmp_path / name)} for name in ("a.png", "b.png")]
    rows = Dataset.from_dict({"id": ["1", "2"], "image": images}, Features({"id": Value("string"), "image": Image()}))
    items = TaskItems(rows, "query", ["image"], "rows")
    assert items[0]["image"] == picture(3)
    with pytest.raises(UserError, match="rows, item 2: the image .*b.png cannot be read .No such file"):
        items[1]


def test_bad_data_is_named(model, pages):
    searcher, options = Searcher(model), dict(task_metadata=pages.metadata)
    with pytest.raises(UserError, match="NoisePages, corpus: item 2: the image cannot be read"):
        searcher.index(table([picture(0), picture(1)[:200]], id=["1", "2"]), **options)
    with pytest.raises(UserError, match="NoisePages, corpus: item 1 has neither"):
        searcher.index(table([None], id=["1"]), **options)
    with pytest.raises(UserError, match="NoisePages, corpus has the columns id, text; expected image"):
        searcher.index(Dataset.from_dict({"id": ["1"], "text": ["a"]}), **options)
    with pytest.raises(UserError, match="the column image holds Value.*; expected images"):
        searcher.index(Dataset.from_dict({"id": ["1"], "image": ["a"]}), **options)
