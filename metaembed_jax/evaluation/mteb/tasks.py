"""What of mteb a name means."""

import difflib
from typing import NamedTuple

from metaembed_jax.errors import UserError

GROUPS = {"vidore": ("ViDoRe(v1)", "ViDoRe(v2)", "ViDoRe(v3)")}


class Benchmark(NamedTuple):
    """Tasks with one mean.

    Attributes:
      name: of the benchmark, or of its only task.
      tasks: those of text and images that are searched, as mteb has them.
      others: the names of the rest.
    """

    name: str
    tasks: list
    others: list[str]


def find(name: str) -> list[Benchmark]:
    """The benchmarks of a group, one benchmark, or one task.

    Raises:
      UserError: mteb is not installed, knows no such name, or has no task there that this model can do.
    """
    try:
        import mteb
    except ImportError as error:
        raise UserError(f"--benchmark={name}: needs mteb ({error}); pip install 'metaembed-jax[eval]'") from error
    found = []
    for one in GROUPS.get(name, (name,)):
        try:
            tasks = mteb.get_benchmark(one).tasks
        except KeyError:
            try:
                tasks = [mteb.get_task(one)]
            except KeyError:
                raise UserError(f"--benchmark={name}: mteb has no such benchmark or task{_nearest(one)}") from None
        searched = [task for task in tasks if _is_searched(task)]
        found.append(Benchmark(one, searched, [task.metadata.name for task in tasks if task not in searched]))
    if not any(benchmark.tasks for benchmark in found):
        raise UserError(f"--benchmark={name}: none of its tasks is retrieval of texts and images")
    return found


def _is_searched(task) -> bool:
    from mteb.abstasks import AbsTaskRetrieval

    return isinstance(task, AbsTaskRetrieval) and {"text", "image"} >= set(task.metadata.modalities)


def _nearest(name: str) -> str:
    import mteb

    names = [benchmark.name for benchmark in mteb.get_benchmarks()] + [task.metadata.name for task in mteb.get_tasks()]
    names = {one.casefold(): one for one in ("mmeb", *GROUPS, *names)}
    close = difflib.get_close_matches(name.casefold(), names)
    return f"; near to it are {', '.join(names[one] for one in close)}" if close else "; there are vidore, mmeb and what mteb lists"
