"""The data of mteb's tasks: fetched, and loaded again."""

from metaembed_jax import hosts
from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.mteb.items import Items, items_of


class PrivateTask(UserError):
    """The data of a task is not for everyone."""


def fetch(task) -> None:
    """Loads the data of a task on every host: one host fetches it, where all share a cache.

    Raises:
      PrivateTask: it is not public, and not to be had.
      UserError: it cannot be fetched.
    """
    problem = hosts.first_then_others(lambda: _load(task))
    of_first = hosts.from_first(problem or "")  # what is left out must be so on all hosts
    if of_first and task.metadata.is_public is False:
        raise PrivateTask(f"{_place(task)} is not public ({of_first})")
    _check(task, problem)


def fetch_here(task) -> None:
    """Loads the data of a task on this host alone.

    Raises:
      UserError: it cannot be fetched.
    """
    _check(task, _load(task))


def items_in(task, split: str, subset: str) -> tuple[Items, Items]:
    """Queries and candidates of a task that is loaded: all of them, as they are before mteb leaves some out."""
    data = task.dataset[subset][split]
    return items_of(data["queries"], "query", task.metadata), items_of(data["corpus"], "candidate", task.metadata)


def _load(task) -> str | None:
    """What went wrong, if something did."""
    try:
        task.load_data()
        task.convert_v1_dataset_format_to_v2(num_proc=None)
    except Exception as error:  # of the network, the hub, a token, or the data: each has errors of its own
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None


def _check(task, problem: str | None) -> None:
    if problem:
        raise UserError(
            f"{_place(task)} cannot be fetched from the Hugging Face hub ({problem}); it must be there, or in its cache"
        )


def _place(task) -> str:
    return f"{task.metadata.name}: {task.metadata.dataset['path']} at {task.metadata.revision}"
