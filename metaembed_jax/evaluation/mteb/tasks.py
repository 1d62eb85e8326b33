"""Names of mteb's benchmarks and tasks, and of groups of them."""

import difflib
from typing import Any, NamedTuple

from metaembed_jax.errors import UserError

GROUPS = {"vidore": ("ViDoRe(v1)", "ViDoRe(v2)", "ViDoRe(v3)")}


class Benchmark(NamedTuple):
    """Tasks with one mean.

    Attributes:
      name: name of the benchmark, or of its only task.
      tasks: mteb's objects of retrieval tasks of texts and images.
      others: the names of all other tasks.
    """

    name: str
    tasks: list
    others: list[str]


def find(name: str) -> list[Benchmark]:
    """Return the benchmarks of a group, one benchmark, or one task.

    Raises:
      UserError: mteb is not installed or does not know the name, or none of the tasks is retrieval of texts and images.
    """
    try:
        import mteb
    except ImportError as error:
        raise UserError(f"{name} needs mteb ({error}); pip install 'metaembed-jax[eval]'") from error
    benchmarks = []
    for member in GROUPS.get(name, (name,)):
        try:
            tasks = mteb.get_benchmark(member).tasks
        except KeyError:
            try:
                tasks = [mteb.get_task(member)]
            except KeyError:
                raise UserError(f"{name}: mteb has no such benchmark or task{_nearest(member)}") from None
        searched = [task for task in tasks if _is_searched(task)]
        benchmarks.append(Benchmark(member, searched, [task.metadata.name for task in tasks if task not in searched]))
    if not any(benchmark.tasks for benchmark in benchmarks):
        raise UserError(f"{name}: none of its tasks is retrieval of texts and images")
    return benchmarks


def _is_searched(task: Any) -> bool:
    from mteb.abstasks import AbsTaskRetrieval

    return isinstance(task, AbsTaskRetrieval) and {"text", "image"} >= set(task.metadata.modalities)


def _nearest(name: str) -> str:
    import mteb

    names = [benchmark.name for benchmark in mteb.get_benchmarks()] + [task.metadata.name for task in mteb.get_tasks()]
    names = {known.casefold(): known for known in ("mmeb", *GROUPS, *names)}
    nearest = [names[known] for known in difflib.get_close_matches(name.casefold(), names)]
    return f"; the nearest are {', '.join(nearest)}" if nearest else "; expected vidore, mmeb or a name that mteb lists"
