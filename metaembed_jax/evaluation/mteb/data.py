"""The data of mteb's tasks: fetched, and loaded again."""

from typing import Any

from metaembed_jax import hosts
from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.mteb.items import TaskItems, items_of


class PrivateTask(UserError):
    """A task whose data is not public."""


def fetch(task: Any) -> None:
    """Load the data of a task on every host: one host fetches it, where all share a cache.

    Raises:
      PrivateTask: it is not public, and cannot be fetched.
      UserError: it cannot be fetched.
    """
    problem = hosts.first_then_others(lambda: _load(task))
    of_first = hosts.from_first(problem or "")  # a task that is left out must be so on all hosts
    if of_first and task.metadata.is_public is False:
        raise PrivateTask(f"{_address(task)} is not public ({of_first})")
    _check(task, problem)


def fetch_here(task: Any) -> None:
    """Load the data of a task on this host alone.

    Raises:
      UserError: it cannot be fetched.
    """
    _check(task, _load(task))


def items_in(task: Any, split: str, subset: str) -> tuple[TaskItems, TaskItems]:
    """Queries and documents of a task that is loaded: all of them, as they are before mteb leaves some out."""
    data = task.dataset[subset][split]
    return items_of(data["queries"], "query", task.metadata), items_of(data["corpus"], "document", task.metadata)


def _load(task: Any) -> str | None:
    """Load the data; the problem, if there was one."""
    try:
        task.load_data()
        task.convert_v1_dataset_format_to_v2(num_proc=None)
    except Exception as error:  # of the network, the hub, a token, or the data: each has errors of its own
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None


def _check(task: Any, problem: str | None) -> None:
    if problem:
        raise UserError(
            f"{_address(task)} cannot be fetched from the Hugging Face hub ({problem}); it must be there, or in its cache"
        )


def _address(task: Any) -> str:
    return f"{task.metadata.name}: {task.metadata.dataset['path']} at {task.metadata.revision}"
