"""Evaluates a model on tasks of mteb: every budget from one encoding, a finished task never again.

OUT/mteb/{task}.json                  the scores at every budget, mteb's own figures, and of which model and data
OUT/mteb.json, mteb.txt, mteb.html    all tasks and their means; the page also has a plot and the worst queries
"""

from collections.abc import Sequence
from pathlib import Path

from metaembed_jax import hosts
from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.benchmark import write_benchmark
from metaembed_jax.evaluation.budgets import by_cost, in_order, search_name
from metaembed_jax.evaluation.mteb.data import PrivateTask, fetch
from metaembed_jax.evaluation.mteb.report import Found, means, picture, table
from metaembed_jax.evaluation.mteb.searcher import Searcher
from metaembed_jax.evaluation.mteb.tasks import Benchmark
from metaembed_jax.evaluation.mteb.worst import examples, misses
from metaembed_jax.evaluation.records import found_once, key_of
from metaembed_jax.evaluation.tables import Table, as_text
from metaembed_jax.evaluation.worst import Miss, worst_of
from metaembed_jax.late_interaction.stages import Stages, as_stages, largest_budget
from metaembed_jax.model import MetaEmbed

LAYOUT = 2  # of a task's file; one of an older layout does not count
FIGURES = ("main_score", "ndcg_at_5", "ndcg_at_10")


def evaluate(
    model: MetaEmbed,
    identity: str,
    benchmarks: Sequence[Benchmark],
    budgets: Sequence,
    out: Path,
    progress: bool,
    about: dict[str, str],
) -> str:
    """Evaluates every task, writes the files above, and returns the tables.

    Args:
      identity: of the model: what was found for another one does not count.
      budgets: each as `as_stages` takes it.
      about: where the numbers are from, as `page.write_page` takes it; its "config" names the model.

    Raises:
      UserError: a budget beyond the model's, or data that cannot be fetched or makes no sense.
    """
    vectors = model.config.vectors("query"), model.config.vectors("candidate")
    searches = in_order(as_stages(budget, *vectors) for budget in budgets)
    searcher = Searcher(model, largest_budget(searches), name=about["config"], revision=identity[:16], progress=progress)
    found = [_evaluate_benchmark(searcher, identity, benchmark, searches, out) for benchmark in benchmarks]
    if not any(one.tasks for one in found):
        raise UserError(next(reason for one in found for reason in one.private))
    tables = [table(one, searches) for one in found]
    if hosts.is_first():
        _write_all(found, searches, tables, picture(found, searches, model.dimension), out, about)
    return "\n\n".join(map(as_text, tables))


def _evaluate_benchmark(searcher: Searcher, identity: str, benchmark: Benchmark, searches: Sequence[Stages], out: Path) -> Found:
    tasks, private = {}, []
    for task in benchmark.tasks:
        name, data = task.metadata.name, (task.metadata.revision, list(task.eval_splits), list(task.hf_subsets))
        key = key_of(LAYOUT, identity, name, *data, sorted(map(search_name, searches)))

        def find(task=task) -> dict:
            return evaluate_task(searcher, task, searches)

        try:
            tasks[task] = found_once(out / "mteb" / f"{name}.json", key, find)
        except PrivateTask as error:
            private.append(str(error))
    return Found(benchmark, tasks, private)


def evaluate_task(searcher: Searcher, task, searches: Sequence[Stages]) -> dict:
    """{"task", "revision", "mteb", "main_score": the name of it, "searches": {"r_q:r_c": {figure: mean over splits and subsets}},
    "worst": [{"split", "subset", "miss": a `worst.Miss` as a dict}, ...], the worst queries at the dearest budget}.

    Raises:
      UserError: the data cannot be fetched (`PrivateTask`, if that is why), or makes no sense.
    """
    from mteb import TaskResult

    fetch(task)
    scores: dict[str, dict] = {search_name(stages): {split: {} for split in task.eval_splits} for stages in searches}
    worst = []
    for split in task.eval_splits:
        for subset in task.hf_subsets:  # outside of the searches, so that its vectors serve all of them
            found, missed = _evaluate_subset(searcher, task, split, subset, searches)
            for name, figures in found.items():
                scores[name][split] |= figures
            worst += [(miss, {"split": split, "subset": subset}) for miss in missed]
    task.unload_data()
    results = {name: TaskResult.from_task_results(task, splits, evaluation_time=0) for name, splits in scores.items()}

    def mean(result, figure: str) -> float:
        return float(result.get_score(getter=lambda values: values[figure]))

    return {
        "task": task.metadata.name,
        "revision": task.metadata.revision,
        "mteb": next(iter(results.values())).mteb_version,
        "main_score": task.metadata.main_score,
        "searches": {name: {figure: mean(result, figure) for figure in FIGURES} for name, result in results.items()},
        "worst": [place | {"miss": miss._asdict()} for miss, place in worst_of(worst)],
    }


def _evaluate_subset(
    searcher: Searcher, task, split: str, subset: str, searches: Sequence[Stages]
) -> tuple[dict[str, dict], list[Miss]]:
    """{search: what mteb found}, and the worst queries, numbered as the data is."""
    if searcher.progress:
        print(f"{task.metadata.name}, {split}, {subset}", flush=True)
    data, found = task.dataset[subset][split], {}
    numbers = {query: number for number, query in enumerate(data["queries"]["id"])}
    for stages in searches:
        at = searcher.at(stages)
        found[search_name(stages)] = task.evaluate(at, split, subsets_to_run=[subset], encode_kwargs={})
    # mteb has now left queries out that nothing is known of. A ranking needs all scores, and searches return the best: scoring
    # once more costs little beside encoding.
    dearest = by_cost(stages[-1] for stages in searches)[-1]
    scores = at.score(data["queries"], dearest, task_metadata=task.metadata, top_ranked=data["top_ranked"])
    missed = misses(task, data["relevant_docs"], scores)
    return found, [miss._replace(query=numbers[scores.queries[miss.query]]) for miss in missed]


def _write_all(
    found: Sequence[Found], searches: Sequence[Stages], tables: Sequence[Table], plot: bytes | None, out: Path, about: dict
) -> None:
    tasks = {task: done for one in found for task, done in one.tasks.items()}
    figures = {
        "tasks": {done["task"]: {name: done[name] for name in done.keys() - {"key", "worst"}} for done in tasks.values()},
        "means": {one.benchmark.name: means(one, searches) for one in found},
    }
    versions = ", ".join(sorted({done["mteb"] for done in tasks.values()}))
    about = about | {"data": f"mteb {versions}, {key_of([(done['task'], done['revision']) for done in tasks.values()])}"}
    title = f"{about['config']}: {', '.join(one.benchmark.name for one in found)}"
    write_benchmark(out, "mteb", title, figures, tables, plot, examples(tasks), about)
