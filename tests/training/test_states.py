"""A run that reads all token states, without Meta Tokens: the baseline of nested vectors."""

import contextlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import metaembed_jax as me
from metaembed_jax.checkpoints.export import export
from metaembed_jax.checkpoints.runs import RunCheckpoints
from metaembed_jax.checkpoints.workdir import create_workdir
from metaembed_jax.config import AllStatesConfig, ObjectivesConfig, with_keys
from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.evaluate_checkpoint import evaluate_checkpoint
from metaembed_jax.late_interaction.pooling import Pools, count_vectors
from metaembed_jax.network_config import row_limits
from metaembed_jax.results import read_results
from metaembed_jax.retrieval.index import Index
from metaembed_jax.retrieval.index_and_search import find, index
from metaembed_jax.training.initialize import find_start, initial_state
from metaembed_jax.training.loop import train
from metaembed_jax.training.step import make_trainer
from tests.training.batches import make_dataset, make_plan
from tests.training.test_step import alone, eight_devices, loss_and_gradients, one_device, relative_norm

MOST = 40, 24  # tokens of a query, of a document: an icon has 9 visual tokens
ITEMS = [Image.new("RGB", (84, 84), colour) for colour in ("red", "blue")] + ["a", "a few words"]


@pytest.fixture
def config(small_config):
    objectives = ObjectivesConfig(matryoshka=None, all_states=AllStatesConfig(evaluated=((40, 1), (40, 4), MOST)))
    model = {"model.readout": "states", "model.query_tokens": MOST[0], "model.document_tokens": MOST[1]}
    return with_keys(small_config, {**model, "name": "states", "objectives": objectives, "rows.size": (64, 72)})


@pytest.mark.slow  # all of it compiles
def test_any_mesh_and_rows_give_the_same_loss_and_gradients(config):
    planned = make_plan(config)
    loss, gradients = loss_and_gradients(config, one_device(), make_dataset(config, planned, shards=1)[0])
    batch = make_dataset(with_keys(config, {"rows.microbatch_rows": 4}), planned, shards=4)[0]
    assert batch.rows.tokens.shape[0] > 1
    for mesh, other in ((one_device(), alone(config, planned[0], 0)), (eight_devices(), batch)):
        other_loss, other_gradients = loss_and_gradients(config, mesh, other)
        np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
        assert relative_norm(gradients, other_gradients) < 1e-5


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """The folder of a trained run."""
    return tmp_path_factory.mktemp("states") / "run"


@pytest.fixture
def trained(config, run):
    if not (run / "results.json").exists():
        assert train(config, run)
    return run


def test_a_run_and_its_evaluation(config, trained, tmp_path):
    results = read_results(trained / "results.json")
    forward, backward = (board.tasks[0].searches for board in results.boards)
    assert [search.budget for search in forward] == ["40:1", "40:4", "40:24"]
    assert [search.bytes_per_document for search in forward[:2]] == [1 * 16 * 2, 4 * 16 * 2]
    assert 9 * 16 * 2 < forward[2].bytes_per_document < 24 * 16 * 2  # the mean of what they have
    assert 4 * 16 * 2 < backward[0].bytes_per_document < 40 * 16 * 2
    assert "icons: vectors are all token states, " in results.boards[0].notes[0]
    evaluate_checkpoint(config, trained, tmp_path, "40:1,40:2")
    assert read_results(tmp_path / "results.json").boards[0].tasks[0].searches[0] == forward[0]  # pooled from all vectors
    with pytest.raises(UserError, match="config.model.readout='states'"):
        evaluate_checkpoint(config, trained, tmp_path, None, "mmeb", tmp_path)


def test_a_model_has_a_vector_for_each_token(trained):
    model = me.MetaEmbed.from_pretrained(trained, dtype="float32", mesh=one_device())
    documents, queries = model.encode_document(ITEMS), model.encode_query(ITEMS[2:])
    items = ({"text" if isinstance(item, str) else "image": item} for item in ITEMS)
    counts = [len(model.processor.document(item).tokens) for item in items]
    assert documents.shape == (4, 24, 16) and count_vectors(documents).tolist() == counts and len(set(counts)) == 3
    lengths = np.linalg.norm(documents, axis=-1)
    np.testing.assert_allclose(lengths, np.arange(24) < np.array(counts)[:, None], atol=1e-5)
    for number, item in enumerate(ITEMS):  # packed and alone
        np.testing.assert_allclose(model.encode_document([item])[0], documents[number], atol=1e-5)
    np.testing.assert_array_equal(model.encode_document(ITEMS, budget=3), Pools(documents).pool(3))
    trimmed = [document[:count] for document, count in zip(documents, counts, strict=True)]
    scores = [[(query @ document.T).max(axis=1).sum() for document in trimmed] for query in queries]
    np.testing.assert_allclose(model.similarity(queries, documents), scores, rtol=1e-5)
    with pytest.raises(UserError, match="reads all states of a query"):
        model.encode_query(["a"], budget=2)


def test_an_index_of_all_vectors_or_of_pools(trained, tmp_path, capsys):
    for number, image in enumerate(ITEMS[:2]):
        image.save(tmp_path / f"{number}.png")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"id": text, "text": text}) + "\n" for text in ITEMS[2:]))
    for budget, most in ((None, 24), (4, 4)):
        index(str(trained), tmp_path / "a.jsonl", tmp_path / f"{most}", budget, "float32", None, 0)
        loaded, model = Index.load(tmp_path / f"{most}"), me.MetaEmbed.from_pretrained(trained)
        hits = find(loaded, model, {"text": "a few words"}, None, 2, None)
        documents = model.encode_document(ITEMS[2:], budget=most)
        expected = model.similarity(model.encode_query(["a few words"]), documents)[0]
        np.testing.assert_allclose(hits.scores[0], np.sort(expected)[::-1], rtol=1e-5)
        with pytest.raises(UserError, match="the vectors of this model are not nested"):
            find(loaded, model, {"text": "a"}, "40:1", 1, None)
    capsys.readouterr()


def test_it_starts_from_a_run_with_meta_tokens(config, small_config, tmp_path):
    """The backbone is that of the run; the head has other states to read, but is kept if it has the width."""
    trainer = make_trainer(small_config, one_device())
    tokenizer = Path(small_config.data.dir) / "icons" / "tokenizer.json"
    create_workdir(tmp_path / "run", small_config, tokenizer, None, {})
    state = trainer.init()
    with contextlib.closing(RunCheckpoints(tmp_path / "run")) as checkpoints:
        checkpoints.save(1, state.parameters, state.optimizer, None)
    config = with_keys(config, {"init_from": str(tmp_path / "run"), "seed": 1})
    config, start = find_start(config)
    with contextlib.closing(RunCheckpoints(tmp_path / "other")) as checkpoints:
        started = initial_state(config, make_trainer(config, one_device()), checkpoints, start)
    assert started.parameters.keys() == {"backbone", "head"} and state.parameters.keys() == {"backbone", "head", "meta_tokens"}
    jax.tree.map(np.testing.assert_array_equal, started.parameters, {name: state.parameters[name] for name in ("backbone", "head")})


def test_what_a_run_of_all_states_refuses(config, small_config, trained, tmp_path):
    with pytest.raises(UserError, match="reads all states; only models with Meta Tokens"):
        export(trained, tmp_path / "export", "transformers")
    for keys, message in (
        ({"objectives": small_config.objectives}, "with config.objectives matryoshka: expected all_states"),
        (
            {"model.readout": "meta_tokens"},
            "with config.objectives all_states: expected all_states, and no other, with states only",
        ),
        ({"model.document_tokens": 25}, r"expected pairs \(40, n\), the last with 25"),
        ({"schedule.exports": ("transformers",)}, "config.schedule.exports.*with config.model.readout='states'"),
    ):
        with pytest.raises(UserError, match=message):
            with_keys(config, keys)
    with pytest.raises(UserError, match="expected at least 40 tokens"):
        row_limits(with_keys(config, {"rows.size": (39, 72)}))
