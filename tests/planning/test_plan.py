"""Plans of small configs, compiled for slices that do not exist."""

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("libtpu")

from metaembed_jax import cli
from metaembed_jax.chips import CHIPS
from metaembed_jax.config import load_config, with_keys
from metaembed_jax.errors import UserError
from metaembed_jax.mesh import make_mesh
from metaembed_jax.planning import layout_search, plan_text
from metaembed_jax.planning.planner import make_plan
from metaembed_jax.planning.programs import with_index_mesh
from metaembed_jax.planning.topology import topology
from metaembed_jax.sharding import MESH_AXES

ROOT = Path(__file__).parents[2]
SMALL = str(ROOT / "tests" / "training" / "small.py")
TINY = str(ROOT / "configs" / "tiny.py")
LORA = load_config(str(ROOT / "configs" / "7b.py")).model.trained


@pytest.fixture(scope="module")
def slices():
    return topology("v5e:2x2")


@pytest.fixture(scope="module")
def config():
    """`small` with the recipe's adapters and optimizer, on a mesh that splits batch and weights."""
    config = load_config(SMALL, {"optimizer.algorithm": "adamw", "mesh.data": "2", "mesh.fsdp": "2", "rows.microbatch_rows": "4"})
    return with_keys(
        config,
        {
            "model.trained": LORA,
            "rows.recompute": "everything",
            "rows.size": (288, 256),
            "model.architecture.vision_config.window_size": 112,
        },
    )


@pytest.fixture(scope="module")
def plan(config, slices):
    return make_plan(config, "train", slices)


def test_memory(plan):
    assert plan.fits and 0.99 < plan.spare < 1
    assert set(plan.memory) == {"trained", "frozen", "optimizer", "batch", "next batch", "padding", "temporaries"}
    assert all(size > 0 for size in plan.memory.values())
    assert plan.memory["optimizer"] > 2 * plan.memory["trained"] > 0.99 * plan.memory["optimizer"]  # two moments


def test_pixels_stay_in_the_hosts_memory(plan):
    """The host holds two batches. The devices get one microbatch at a time, and nothing copies all pixels."""
    pixels = plan.rows["rows"] // 4 * 256 * 588
    assert plan.host_bytes == 2 * pixels
    assert 0 < plan.memory["batch"] < pixels and not any(
        "u8[" in item.what and item.bytes > pixels / 2 for item in plan.temporaries
    )


def test_flops(plan):
    """JAX's splash kernel has no cost estimate, so the count in closed form is used."""
    counted = plan.flops["forward"] + plan.flops["backward"] + plan.flops["extra"]
    assert "splash" in plan.missing and 0.7 * counted < plan.flops["compiled"] < counted
    assert plan.seconds["compute"] == counted / 4 / 197e12
    assert plan.mfu < 1 and plan.seconds[plan.binds] == max(plan.seconds.values())


def test_collectives(plan):
    """Weights, adapters' gradients and vectors cross the links, and no activations: a gather of those would be far more."""
    expected = {"all-gather": 3.19e6, "all-reduce": 1.95e6, "reduce-scatter": 9.8e4, "all-to-all": 9.8e4}
    assert plan.ici_bytes == pytest.approx(expected, rel=0.2)
    assert all(item.op_name for item in plan.collectives) and len(plan.collectives) == len(plan.temporaries) == 5


def test_report(plan, config, slices):
    text = plan_text.describe(plan, config.model, slices)
    first, *_ = text.splitlines()
    assert first.startswith("fits: 0.0") and first.endswith(" to spare")
    for word in (
        "4 devices, 1 hosts",
        "4 at once, recompute=everything",
        "items of typical sizes, not of your data, use ",
        "data=2, fsdp=2, tensor=1",
        "data 2 hops, at most 1 a step; fsdp 2 hops",
        "chip-hours",
        "largest temporaries",
        "largest collectives",
    ):
        assert word in text
    assert json.loads(json.dumps(plan.to_json()))["fits"] is True


def test_two_slices(config):
    """fsdp stays inside a slice. data goes over both: sums of gradients, and the vectors that the loss gathers."""
    config = with_keys(config, {"mesh.data": 4, "mesh.fsdp": 8, "rows.batch_size": 32, "rows.microbatch_rows": 0})
    slices = topology("2xv5e:4x4")
    plan = make_plan(config, "train", slices)
    assert plan.fits and plan.slices == 2 and plan.hosts == 8
    assert plan.rings["data"]["crossings"] == 2 and plan.rings["fsdp"]["crossings"] == 0
    # A device sends its sixteenth of a slice's sum, padded to tiles, and the vectors of its own pair.
    assert plan.dcn_bytes == pytest.approx({"all-reduce": 1.19e5, "all-gather": 2.46e4, "reduce-scatter": 8.2e3}, rel=0.2)
    assert plan.dcn_bytes["all-reduce"] > 4 * plan.parameters["trained"] / 16
    assert plan.seconds["DCN"] == pytest.approx(sum(plan.dcn_bytes.values()) / slices.chip.dcn_bandwidth)
    text = plan_text.describe(plan, config.model, slices)
    assert "data 4 hops, at most 2 a step, 2 steps between slices" in text and "bytes over DCN, all-reduce" in text


def test_search_keeps_fsdp_in_a_slice(config):
    layouts = layout_search.layouts(config, topology("2xv5e:2x2"))
    assert {layout.mesh for layout in layouts} == {(8, 1, 1), (4, 2, 1), (2, 4, 1)}


def test_tiny_compiles_for_v5e():
    config = load_config(TINY, {"init_from": "", "mesh.data": "2", "mesh.fsdp": "2", "mesh.tensor": "2"})
    plan = make_plan(config, "train", topology("v5e:2x4"))
    assert plan.fits and plan.devices == 8 and plan.mesh == {"data": 2, "fsdp": 2, "tensor": 2}


def test_encoding(config, slices):
    plan = make_plan(config, "encode", slices)
    assert plan.fits and plan.unit == "items" and plan.calls == 0
    lowest = 0.7 if "splash" in plan.missing else 0.9  # as in test_flops
    assert lowest * plan.flops["forward"] < plan.flops["compiled"] < 1.1 * plan.flops["forward"]


def plan_of_search(capsys, *flags):
    cli.main(["plan", "--config=7b", "--what=search", "--json", *flags])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "flags, low, high",
    [
        (["--queries=8"], 1, 1.01),
        (["--queries=1", "--budget=1:1:1000>16:64"], 1 / 64 + 1 / 100, 0.05),
        (["--queries=1", "--dtype=int8"], 1, 1.01),
        (["--queries=1", "--budget=1:1x128:1000>16:64x896"], 1 / 64 / 28 + 1 / 400, 0.02),
        (["--queries=8", "--budget=16:64x896"], 1 / 4, 0.26),
    ],
)
def test_a_search_moves_little_more_than_it_must(capsys, flags, low, high):
    """100,000 items of 64 x 3,584: all vectors are read once, or the first of each and of 1,000 survivors; or so many prefixes."""
    plan = plan_of_search(capsys, "--topology=v5e:2x4", *flags)
    assert plan["fits"] and plan["unit"] == "queries" and not plan["missing"] and not plan["parameters"]["frozen"]
    assert plan["index_bytes"] == 100_000 / 8 * 64 * (3584 * 2 if "--dtype=int8" not in flags else 3584 + 4)
    assert low < plan["hbm_bytes"] / plan["index_bytes"] < high
    assert plan["memory"]["temporaries"] < 2**20 and plan["flops"]["compiled"] > plan["flops"]["forward"]


def test_a_search_of_ten_million_items_fits(capsys):
    flags = "--items=10_000_000", "--vectors=16", "--width=128", "--dtype=int8", "--queries=1", "--budget=16:16"
    plan = plan_of_search(capsys, "--topology=v5e:8x8", *flags)
    assert plan["fits"] and plan["memory"]["index"] < 1.01 * plan["index_bytes"] + 10_000_000 / 64 * 1.01
    assert plan["details"] == "1 query of 16:16 in 10,000,000 items of 16 x 128 int8, the 10 best"


@pytest.mark.parametrize(
    "name, sizes", [("v5e:2x4", (4, 2, 1)), ("v5e:1x1", (1, 1, 1)), ("v5p:2x2x2", (8, 1, 1)), ("2xv5e:2x2", (4, 2, 1))]
)
def test_encoding_has_the_mesh_of_index(name, sizes):
    slices = topology(name)
    config = with_index_mesh(load_config(str(ROOT / "configs" / "7b.py")), slices)
    assert tuple(make_mesh(**dataclasses.asdict(config.mesh), devices=slices.devices).shape.values()) == sizes


def test_what_does_not_fit_exits_with_1(capsys):
    flags = [f"--config={SMALL}", "--topology=v5e:1x1", "--what=encode"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", *flags, "--config.model.architecture.text_config.vocab_size=200_000_000"])
    assert stopped.value.code == 1
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("does not fit: ") and "GiB too many; largest are frozen" in first and "take a larger slice" in first


def test_search_compiles_little_and_keeps_what_fits(plan, config, slices, monkeypatch):
    """A compiler that is fastest with weights on every device, and has room for eight rows at once."""
    tried = []

    def compile_at_once(config, what, slices):
        sizes, size = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}, config.rows.microbatch_rows
        tried.append((*sizes.values(), size, config.rows.recompute))
        memory = plan.memory | {"temporaries": int(slices.chip.usable_bytes * size / 8.5)}
        seconds = {"compute": config.mesh.fsdp / size}
        rows = plan.rows | {"at_once": size}
        return dataclasses.replace(plan, memory=memory, seconds=seconds, mesh=sizes, rows=rows, recompute=config.rows.recompute)

    monkeypatch.setattr(layout_search, "make_plan", compile_at_once)
    plans = layout_search.search(config, slices)
    assert len(tried) == len(set(tried)) <= layout_search.COMPILED
    assert plans and all(plan.fits and plan.rows["at_once"] <= 8 for plan in plans)
    first, _, _, *rows = plan_text.describe_search(plans).splitlines()
    assert first.startswith(
        "fastest: --config.mesh.data=4 --config.mesh.fsdp=1 --config.mesh.tensor=1 --config.rows.microbatch_rows=8 "
    )
    assert len(rows) == len(plans)


WRONG = [
    (["--topology=v9:1x1"], r"--topology=v9:1x1: no such slice.*v5e: 1x1 2x2 2x4"),
    (["--topology=v5e:32x32"], "no such slice"),
    (["--topology=0xv5e:2x2"], "no such slice"),
    (["--topology=2xv5e:2x2", "--config.mesh.data=1", "--config.mesh.fsdp=8"], "config.mesh.data=1 does not divide over 2 slices"),
    (["--topology=v5e:2x2", "--config.mesh.slices=2"], "config.mesh.slices=2: the devices are of 1"),
    (["--topology=v5e:2x4", "--config.mesh.data=3"], r"config.mesh \(data=3, fsdp=1, tensor=1\) does not fit 8 devices"),
    (["--topology=v5e:4x8"], "config.rows.batch_size=16 does not divide over the mesh"),
    (["--topology=v5e:2x2", "--config.rows.microbatch_rows=2"], "config.rows.microbatch_rows=2: expected at least data x fsdp = 4"),
    (
        ["--topology=v5e:2x2", "--config.rows.recompute=all"],
        "config.rows.recompute='all': expected 'everything' or 'microbatches' or 'layers' or",
    ),
    (["--topology=v5e:2x2", "--what=encode", "--search"], "--search is for training"),
    (["--topology=v5e:2x2", "--items=5", "--dtype=int8"], "--what=train has no items, dtype"),
    (["--topology=v5e:2x2", "--what=search", "--items=0"], "--items=0: expected a positive integer"),
    (["--topology=v5e:2x2", "--what=search", "--budget=1:1,2:2"], "--budget=1:1,2:2: expected one search"),
    (["--topology=v5e:2x2", "--what=search", "--budget=1:1:5>2:2"], "-k=10: expected at most 5"),
    (["--topology=v5e:2x2", "--what=serve"], "invalid choice: 'serve'"),
]


@pytest.mark.parametrize("flags, message", WRONG, ids=[" ".join(flags) for flags, _ in WRONG])
def test_wrong_flags(flags, message):
    with pytest.raises(UserError, match=message):
        cli.main(["plan", f"--config={SMALL}", *flags])


def test_architecture_comes_from_the_config_before(tmp_path):
    empty = tmp_path / "empty.py"
    empty.write_text("from metaembed_jax.config import RunConfig\nget_config = lambda arg=None: RunConfig()\n")
    with pytest.raises(UserError, match="config.model.architecture is empty"):
        cli.main(["plan", f"--config={empty}", "--topology=v5e:1x1", "--config.init_from=some/model"])


def test_every_chip_has_a_source():
    for chip in CHIPS.values():
        assert chip.source.startswith("https://") and 0.9 < chip.usable_bytes * chip.devices / chip.hbm_bytes < 1.01
