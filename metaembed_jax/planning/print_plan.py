"""The command `plan`."""

import functools
import json
import sys

import jax

from metaembed_jax.config.keys import with_keys
from metaembed_jax.config.run import RunConfig
from metaembed_jax.errors import UserError
from metaembed_jax.planning import plan_text
from metaembed_jax.planning.layout_search import search
from metaembed_jax.planning.planner import make_plan
from metaembed_jax.planning.programs import with_index_mesh
from metaembed_jax.planning.search_program import make_search, search_program
from metaembed_jax.planning.topology import topology
from metaembed_jax.training.stages import with_architecture


def plan(
    config: RunConfig,
    slice_name: str,
    what: str,
    is_search: bool,
    as_json: bool,
    has_mesh: bool = True,
    index_options: dict | None = None,
) -> bool:
    """Print the plan of a program; with `is_search`, those of the train step with the most promising layouts.

    Args:
      has_mesh: encode on the mesh of the config; otherwise, on that of `metaembed index`.
      index_options: arguments of `make_search`, with what="search".

    Returns:
      True if the program fits; of a search, if any layout does.

    Raises:
      UserError: an unknown slice, no libtpu, or a config that cannot run there.
    """
    jax.config.update("jax_platforms", "cpu")  # libtpu is used as a compiler only
    slices = topology(slice_name)
    config = with_architecture(config)
    if is_search and what != "train":
        raise UserError(f"--search is for training, not for --what={what}")
    if index_options and what != "search":
        raise UserError(f"--what={what} has no {', '.join(index_options)}; expected --what=search with that")
    if is_search:
        plans = search(config, slices)
        print(json.dumps([plan.to_json() for plan in plans]) if as_json else plan_text.describe_search(plans))
        return bool(plans)
    if what == "encode" and not has_mesh:
        config = with_index_mesh(config, slices)
    make = None
    if what == "search":
        make = functools.partial(search_program, search=make_search(config, **(index_options or {})))
        config = with_keys(config, {"mesh.data": -1, "mesh.fsdp": 1, "mesh.tensor": 1, "mesh.slices": 0})  # it uses all devices
    print(f"compiling {config.name} for {slices.name}; the largest take a minute or two", file=sys.stderr)
    plan = make_plan(config, what, slices, make)
    if as_json:
        print(json.dumps(plan.to_json() | {"verdict": plan_text.verdict(plan, config.model)}))
    else:
        print(plan_text.describe(plan, config.model, slices))
    return plan.fits
