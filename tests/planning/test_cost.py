"""Costs of short programs, written by hand in the compiler's notation."""

import pytest

from metaembed_jax.planning.cost import count
from metaembed_jax.planning.hlo import parse

LOOPS = """HloModule loops, is_scheduled=true

%inner (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8,8]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %y = f32[8,8]{1,0:T(8,128)} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(f)/inner"}
  ROOT %out = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) tuple(%i, %y)
}

%inner_condition (q: (s32[], f32[8,8])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) parameter(0)
  %bound = s32[]{:T(128)} constant(5)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %bound), direction=LT
}

%outer (r: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %r = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) parameter(0)
  ROOT %again = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) while(%r), condition=%inner_condition, body=%inner
}

%outer_condition (s: (s32[], f32[8,8])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) parameter(0)
  ROOT %true = pred[]{:T(512)} constant(true)
}

ENTRY %main (a: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %a = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) parameter(0)
  ROOT %loop = (s32[], f32[8,8]) while(%a), condition=%outer_condition, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
}
"""

FUSIONS = """HloModule fusions

%product (a: bf16[4,128,256], b: bf16[256,512], i: s32[]) -> bf16[128,512] {
  %a = bf16[4,128,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(1)
  %i = s32[]{:T(128)} parameter(2)
  %slice = bf16[1,128,256]{2,1,0:T(8,128)(2,1)} dynamic-slice(%a, %i, %i, %i), dynamic_slice_sizes={1,128,256}
  %cut = bf16[128,256]{1,0:T(8,128)(2,1)} bitcast(%slice)
  ROOT %product = bf16[128,512]{1,0:T(8,128)(2,1)} convolution(%cut, %b), dim_labels=bf_io->bf
}

%put (c: f32[4,128,512], d: bf16[128,512], i: s32[]) -> f32[4,128,512] {
  %c = f32[4,128,512]{2,1,0:T(8,128)} parameter(0)
  %d = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(1)
  %i = s32[]{:T(128)} parameter(2)
  %wide = f32[1,128,512]{2,1,0:T(8,128)} convert(%d)
  ROOT %update = f32[4,128,512]{2,1,0:T(8,128)} dynamic-update-slice(%c, %wide, %i, %i, %i)
}

ENTRY %main (a: bf16[4,128,256], b: bf16[256,512], c: f32[4,128,512], i: s32[]) -> f32[4,128,512] {
  %a = bf16[4,128,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %c = f32[4,128,512]{2,1,0:T(8,128)} parameter(2)
  %i = s32[]{:T(128)S(6)} parameter(3)
  %x = bf16[128,512]{1,0:T(8,128)(2,1)} fusion(%a, %b, %i), kind=kOutput, calls=%product, metadata={op_name="jit(f)/x"}
  ROOT %y = f32[4,128,512]{2,1,0:T(8,128)} fusion(%c, %x, %i), kind=kLoop, calls=%put, metadata={op_name="jit(f)/y"}
}
"""

COLLECTIVES = """HloModule collectives

%add (l: f32[], r: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  %r = f32[] parameter(1)
  ROOT %sum = f32[] add(%l, %r)
}

%begin (p: f32[1024]) -> f32[4096] {
  %p = f32[1024]{0:T(1024)} parameter(0)
  ROOT %g1 = f32[4096]{0:T(1024)} all-gather(%p), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}
}

%beside (p: f32[1024]) -> f32[4096] {
  %p = f32[1024]{0:T(1024)} parameter(0)
  ROOT %g2 = f32[4096]{0:T(1024)} all-gather(%p), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}
}

ENTRY %main (a: f32[1024]) -> f32[4096] {
  %a = f32[1024]{0:T(1024)} parameter(0)
  %r = f32[1024]{0:T(1024)} all-reduce(%a), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %s = f32[128]{0:T(128)} reduce-scatter(%r), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
  %start = (f32[1024]{0:T(1024)}, f32[8192]{0:T(1024)}) all-gather-start(%r), channel_id=3, replica_groups={}, dimensions={0}
  %done = f32[8192]{0:T(1024)} all-gather-done(%start)
  %p = f32[1024]{0:T(1024)} collective-permute(%r), channel_id=4, source_target_pairs={{0,1},{1,0}}
  %t = f32[1024]{0:T(1024)} all-to-all(%p), channel_id=5, replica_groups=mesh['x'=8] {'x':(2)4}, dimensions={0}
  %f1 = f32[4096]{0:T(1024)} fusion(%t), kind=kCustom, calls=%begin
  ROOT %f2 = f32[4096]{0:T(1024)} fusion(%t), kind=kOutput, calls=%beside
}
"""

SLICES = """HloModule slices

ENTRY %main (a: f32[1024]) -> f32[4096] {
  %a = f32[1024]{0:T(1024)} parameter(0), metadata={op_name="jit(f)/gradients"}
  %after = token[] after-all()
  %sum = (f32[1024]{0:T(1024)}, u32[]{:S(2)}, token[]) send(%a, %after), channel_id=1, frontend_attributes={KIND="ALL_REDUCE"}
  %summed = (f32[1024]{0:T(1024)}, u32[]{:S(2)}, token[]) recv(%after), channel_id=2, frontend_attributes={KIND="ALL_REDUCE"}
  %give = (f32[1024]{0:T(1024)}, u32[]{:S(2)}, token[]) send(%a, %after), channel_id=3, frontend_attributes={KIND="ALL_GATHER"}
  %given = (f32[4096]{0:T(1024)}, u32[]{:S(2)}, token[]) recv(%after), channel_id=4, frontend_attributes={KIND="ALL_GATHER"}
  %done = (f32[4096]{0:T(1024)}, token[]) recv-done(%given), channel_id=4
  ROOT %result = f32[4096]{0:T(1024)} get-tuple-element(%done), index=0
}
""".replace("KIND", "_xla_megascale_transfer_type")

AHEAD = """HloModule ahead

ENTRY %main (a: f32[16,128]) -> f32[16,128] {
  %a = f32[16,128]{1,0:T(8,128)} parameter(0)
  %start1 = ((f32[16,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:8], [0:128]}
  %start2 = ((f32[16,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[8:16], [0:128]}
  %half1 = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%start1)
  %half2 = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%start2)
  %x = f32[16,128]{1,0:T(8,128)S(1)} custom-call(%half1, %half2), custom_call_target="ConcatBitcast"
  ROOT %y = f32[16,128]{1,0:T(8,128)} copy(%x)
}
"""

BRANCHES = """HloModule branches

%cheap (p: f32[8,8]) -> f32[8,8] {
  ROOT %p = f32[8,8]{1,0} parameter(0)
}

%dear (q: f32[8,8]) -> f32[8,8] {
  %q = f32[8,8]{1,0} parameter(0)
  ROOT %y = f32[8,8]{1,0} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (i: s32[], a: f32[8,8]) -> f32[8,8] {
  %i = s32[] parameter(0)
  %a = f32[8,8]{1,0} parameter(1)
  ROOT %c = f32[8,8]{1,0} conditional(%i, %a, %a), branch_computations={%cheap, %dear}
}
"""

CONVOLUTION = """HloModule convolution

ENTRY %main (a: {a}, b: {b}) -> {out} {{
  %a = {a} parameter(0)
  %b = {b} parameter(1)
  ROOT %y = {out} convolution(%a, %b), {attributes}
}}
"""


def test_nested_loops_are_multiplied_out():
    cost = count(LOOPS, devices=1)
    assert cost.flops == 3 * 5 * 2 * 8**3
    tile = 8 * 128 * 4  # [8, 8] padded to a tile of 8 x 128 float32
    assert cost.hbm_bytes == 3 * 5 * 3 * tile
    (temporary,) = cost.temporaries
    assert temporary == (tile, "f32[8,8]", 15, "jit(f)/inner")


def test_turns_put_into_one_count_once():
    twice = LOOPS.replace("tuple(%i, %y)", "tuple(%next, %y)")
    step = "  %two = s32[]{:T(128)} constant(2)\n  %next = s32[]{:T(128)} add(%i, %two)\n  ROOT %out"
    twice = twice.replace("  ROOT %out", step, 1)
    assert count(twice, 1).flops == 3 * 3 * 2 * 8**3


def test_loops_without_a_known_end_are_named():
    cost = count(LOOPS.replace("constant(5)", "parameter(1)"), devices=1)
    assert cost.flops == 3 * 2 * 8**3 and cost.unknown == ("again",)


def test_fusions_read_slices_and_update_in_place():
    cost = count(FUSIONS, devices=1)
    assert cost.flops == 2 * 128 * 256 * 512
    product = 128 * 256 * 2 + 128 * 512 * 2  # a quarter of a, nothing of b, which is on the chip, and the result
    update = 128 * 512 * 2 + 128 * 512 * 4  # x, and a quarter of c
    assert cost.hbm_bytes == product + update
    assert [item.op_name for item in cost.temporaries] == ["jit(f)/x"]


def test_slices_fetched_ahead_read_what_they_take():
    cost = count(AHEAD, devices=1)
    assert cost.hbm_bytes == 2 * 8 * 128 * 4 + 16 * 128 * 4  # each half once, and the result


def test_collectives_count_what_a_device_sends():
    cost = count(COLLECTIVES, devices=8)
    assert cost.ici_bytes == {
        "all-reduce": 2 * 4096 / 2,
        "reduce-scatter": 4096 * 7 / 8,
        "all-gather": 4096 * 7 + 4096 * 3,  # the one in two fusions is one
        "collective-permute": 4096,
        "all-to-all": 4096 * 3 / 4,
    }
    assert cost.collectives[0] == (4096 * 7, "all-gather f32[1024]", 1, "start")


def test_what_crosses_slices_is_not_ici():
    cost = count(SLICES, devices=64, slices=4)
    assert cost.ici_bytes == {} and cost.dcn_bytes == {"all-reduce": 2 * 4096 * 3 / 4, "all-gather": 4096 * 3}
    assert cost.hbm_bytes == 4096 + 4096 + 4096 + 4 * 4096  # a host reads and writes HBM as a device does
    assert cost.collectives[0] == (4096 * 3, "all-gather between slices f32[1024]", 1, "jit(f)/gradients")
    assert [item.what for item in cost.temporaries[:2]] == ["f32[4096]", "f32[1024]"]


def test_branches_count_by_their_shares():
    assert count(BRANCHES, devices=1, branches=(0.75, 0.25)).flops == 2 * 8**3 / 4
    assert count(BRANCHES, devices=1).flops == 2 * 8**3 / 2


@pytest.mark.parametrize(
    "a, b, out, attributes, flops",
    [
        ("f32[64,32]{1,0}", "f32[32,16]{1,0}", "f32[64,16]{1,0}", "dim_labels=bf_io->bf", 2 * 64 * 32 * 16),
        # A batch of 6 products, as a spatial axis whose window meets one real input at each position.
        (
            "f32[6,64,32]{2,1,0}",
            "f32[6,32,16]{2,1,0}",
            "f32[6,64,16]{2,1,0}",
            "window={size=6 stride=5 lhs_dilate=6}, dim_labels=0bf_0io->0bf",
            2 * 6 * 64 * 32 * 16,
        ),
        # An image of 8 x 8 under a window of 3 x 3 whose border is padding.
        (
            "f32[1,8,8,4]{3,2,1,0}",
            "f32[3,3,4,5]{3,2,1,0}",
            "f32[1,8,8,5]{3,2,1,0}",
            "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            2 * 4 * 5 * (3 * 8 - 2) ** 2,
        ),
    ],
)
def test_convolutions_count_no_padding(a, b, out, attributes, flops):
    assert count(CONVOLUTION.format(a=a, b=b, out=out, attributes=attributes), devices=1).flops == flops


KERNEL = """
ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  ROOT %call.51 = f32[8,128]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\"block_q\": 512}"
}}, metadata={op_name="jit(f)/while/body/closed_call/splash/splash_forward/pallas_call"}, backend_config={COST}
}
"""


def test_kernels_without_an_estimate_are_named():
    """The name of a kernel with metadata comes after line breaks."""
    silent = count(KERNEL, devices=1)
    assert silent.flops == 0 and silent.unknown == ("splash_forward",)
    assert count(KERNEL.replace("/pallas_call", "/kernel"), devices=1).unknown[0].startswith("jit(f)/while")
    stated = count(KERNEL.replace("COST", '"custom_call_config":{"cost_estimate":{"bytes_accessed":"7","flops":"99"}}'), devices=1)
    assert stated.flops == 99 and stated.hbm_bytes == 7 and not stated.unknown


def test_parse_keeps_every_instruction():
    module = parse(COLLECTIVES)
    assert module.entry == "main" and list(module.computations) == ["add", "begin", "beside", "main"]
    main = module.computations["main"]
    assert main["start"].opcode == "all-gather-start" and main["start"].operands == ("r",)
    assert [shape.dims for shape in main["start"].shapes] == [(1024,), (8192,)]
    assert main.root.name == "f2"
