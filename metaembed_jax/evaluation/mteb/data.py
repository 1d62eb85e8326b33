"""Fetch and load the data of mteb's tasks."""

from typing import Any

from metaembed_jax import hosts
from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.mteb.items import TaskItems, items_of


class PrivateTask(UserError):
    """A task whose data is not public."""


def fetch(task: Any) -> None:
    """Load the data of a task on every host; one host fetches it for all that share a cache.

    Raises:
      PrivateTask: the data is not public, and cannot be fetched.
      UserError: the data cannot be fetched.
    """
    problem = hosts.first_then_others(lambda: _load(task))
    of_first = hosts.from_first(problem or "")  # all hosts must leave out the same tasks
    if of_first and task.metadata.is_public is False:
        raise PrivateTask(f"{_address(task)} is not public ({of_first})")
    _check(task, problem)


def fetch_here(task: Any) -> None:
    """Load the data of a task on this host only.

    Raises:
      UserError: the data cannot be fetched.
    """
    _check(task, _load(task))


def items_in(task: Any, split: str, subset: str) -> tuple[TaskItems, TaskItems]:
    """Return the queries and documents of a loaded task, with those that mteb leaves out later."""
    data = task.dataset[subset][split]
    return items_of(data["queries"], "query", task.metadata), items_of(data["corpus"], "document", task.metadata)


def _load(task: Any) -> str | None:
    """Load the data; return a line that says why it failed, or None."""
    try:
        task.load_data()
        task.convert_v1_dataset_format_to_v2(num_proc=None)
    except Exception as error:  # network, hub, token and data raise errors of many libraries
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None


def _check(task: Any, problem: str | None) -> None:
    if problem:
        raise UserError(
            f"{_address(task)} cannot be fetched from the Hugging Face hub ({problem}); it must be on the hub or in its cache"
        )


def _address(task: Any) -> str:
    return f"{task.metadata.name}: {task.metadata.dataset['path']} at {task.metadata.revision}"
