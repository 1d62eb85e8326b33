"""`python -m metaembed_jax plan`: prints a plan, and says by its exit code whether it fits."""

import json
import sys

import jax

from metaembed_jax.config.run import RunConfig
from metaembed_jax.errors import UserError
from metaembed_jax.planning import plan_text
from metaembed_jax.planning.layout_search import search
from metaembed_jax.planning.planner import make_plan
from metaembed_jax.planning.topology import topology
from metaembed_jax.training.stages import with_architecture


def plan(config: RunConfig, slice_name: str, what: str, is_search: bool, as_json: bool) -> bool:
    """Prints the plan of one program, or with `is_search` of the train step on every mesh worth trying.

    Returns:
      Whether it fits; of a search, whether anything does.

    Raises:
      UserError: no such slice, no libtpu, or a config that cannot run there.
    """
    jax.config.update("jax_platforms", "cpu")  # of the TPU only its compiler is wanted
    where = topology(slice_name)
    config = with_architecture(config)
    if is_search and what != "train":
        raise UserError(f"--search is for training, not for --what={what}")
    if is_search:
        plans = search(config, where)
        print(json.dumps([one.to_json() for one in plans]) if as_json else plan_text.describe_search(plans))
        return bool(plans)
    print(f"compiling {config.name} for {where.name}; the largest take a minute or two", file=sys.stderr)
    made = make_plan(config, what, where)
    if as_json:
        print(json.dumps(made.to_json() | {"verdict": plan_text.verdict(made, config.model)}))
    else:
        print(plan_text.describe(made, config.model, where))
    return made.fits
