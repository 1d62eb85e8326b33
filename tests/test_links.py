"""The order of devices on TPU slices, which the compiler describes, and on hosts without slices."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

pytest.importorskip("libtpu")

from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh

from metaembed_jax.errors import UserError
from metaembed_jax.links import Ring, rings, slice_size
from metaembed_jax.mesh import make_mesh, smallest_fsdp
from metaembed_jax.sharding import MESH_AXES, fetch_rows, put_rows, rows_here, rows_owned


def devices_of(name, slices=1):
    several = {"num_slices": slices} if slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **several).devices


@pytest.fixture(scope="module")
def two_slices():
    return devices_of("v5e:4x4", 2)


@dataclasses.dataclass(frozen=True)
class Card:
    """A device of a host without slices."""

    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "H100"


ROUTES = [
    # slice, (data, fsdp, tensor), (hops, longest step) of data and fsdp, the same of devices in their own order
    ("v5e:8x8", (8, 8, 1), [(8, 1), (8, 1)], [(40, 6), (14, 4)]),
    ("v6e:8x8", (8, 8, 1), [(8, 1), (8, 1)], [(40, 6), (14, 4)]),
    ("v5p:4x4x4", (16, 4, 1), [(20, 2), (4, 1)], [(52, 5), (6, 2)]),
    ("v5e:16x16", (16, 16, 1), [(16, 1), (16, 1)], [(144, 10), (30, 8)]),
]


@pytest.mark.parametrize("name, sizes, expected, unchanged", ROUTES, ids=[route[0] for route in ROUTES])
def test_rings_are_those_of_create_device_mesh(name, sizes, expected, unchanged):
    devices = devices_of(name)
    reference = Mesh(mesh_utils.create_device_mesh(sizes, devices), MESH_AXES)
    arranged = rings(make_mesh(*sizes, devices=devices))
    assert arranged == rings(reference)
    assert [arranged[axis][:2] for axis in ("data", "fsdp")] == expected and arranged["tensor"] == Ring(0, 0, 0)
    in_order = rings(Mesh(np.asarray(devices).reshape(sizes), MESH_AXES))
    assert [in_order[axis][:2] for axis in ("data", "fsdp")] == unchanged


def test_devices_keep_their_order_where_it_has_shorter_rings():
    devices = devices_of("v5e:2x4")
    assert rings(make_mesh(4, 2, devices=devices))["data"] == Ring(4, 1, 0)
    assert rings(Mesh(mesh_utils.create_device_mesh((4, 2, 1), devices), MESH_AXES))["data"].hops == 8


def test_fsdp_and_tensor_stay_in_a_slice(two_slices):
    mesh = make_mesh(4, 4, 2, devices=two_slices)
    hybrid = mesh_utils.create_hybrid_device_mesh((2, 4, 2), (2, 1, 1), two_slices, allow_split_physical_axes=True)
    np.testing.assert_array_equal(mesh.devices, hybrid)
    assert {axis: ring.crossings for axis, ring in rings(mesh).items()} == {"data": 2, "fsdp": 0, "tensor": 0}
    assert make_mesh(slices=2, devices=two_slices).shape["data"] == 32


def test_one_slice_lets_fsdp_cross_slices(two_slices):
    mesh = make_mesh(1, 32, slices=1, devices=two_slices)
    assert rings(mesh)["fsdp"].crossings == 2


WRONG = [
    ((1, 32, 1, 0), r"config.mesh.data=1 does not divide over 2 slices of 16 devices: expected a multiple of 2"),
    ((2, 16, 1, 3), r"config.mesh.slices=3: the devices are of 2; expected that number, 0 .all."),
    ((2, 16, 1, -1), r"config.mesh.slices=-1: the devices are of 2"),
]


@pytest.mark.parametrize("sizes, message", WRONG, ids=[str(sizes) for sizes, _ in WRONG])
def test_slices_that_do_not_fit(two_slices, sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(*sizes, devices=two_slices)


def test_slices_of_two_sizes(two_slices):
    with pytest.raises(UserError, match="2 slices of 8 and 16 devices: expected"):
        make_mesh(devices=two_slices[:24])


def test_one_slice_is_not_two():
    with pytest.raises(UserError, match="config.mesh.slices=2: the devices are of 1"):
        make_mesh(slices=2, devices=jax.devices())


def test_hosts_without_slices():
    """fsdp stays in a host if it fits there."""
    devices = [Card(n, n // 8) for n in range(16)]
    order = make_mesh(2, 8, devices=devices).devices
    assert [{device.process_index for device in row.flat} for row in order] == [{0}, {1}]
    assert make_mesh(1, 16, devices=devices).devices.shape == (1, 16, 1)
    with pytest.raises(UserError, match="config.mesh.slices=4: the devices are of 2"):
        make_mesh(4, 4, slices=4, devices=devices)
    assert rings(make_mesh(2, 8, devices=devices)) == {}


def test_fake_devices_keep_their_order():
    order = jax.devices()[::-1]
    assert list(make_mesh(2, 2, 2, devices=order).devices.flat) == order


def test_a_part_of_a_slice_keeps_its_order():
    devices = devices_of("v5e:2x4")[:3]
    with pytest.warns(UserWarning, match="keeps the order of its devices"):
        mesh = make_mesh(devices=devices)
    assert list(mesh.devices.flat) == list(devices)


GIB = 2**30


@pytest.mark.parametrize(
    "weights, memory, devices, fsdp",
    [
        (7.5 * GIB, 15.75 * GIB, 8, 1),  # 3b on v5e
        (15.1 * GIB, 15.75 * GIB, 8, 2),  # 7b
        (9.5 * GIB, 15.75 * GIB, 1, 1),  # there is no other device
        (21 * GIB, 15.75 * GIB, 12, 3),
        (21 * GIB, 15.75 * GIB, 10, 5),  # 3 does not divide 10
        (400 * GIB, 15.75 * GIB, 8, 8),  # more than all have
        (15.1 * GIB, 95 * GIB, 4, 1),
    ],
)
def test_weights_are_divided_over_the_fewest_devices(weights, memory, devices, fsdp):
    assert smallest_fsdp(int(weights), int(memory), devices) == fsdp


def test_weights_stay_in_a_slice():
    assert slice_size(devices_of("v5e:4x4", 2)) == 16 and slice_size(devices_of("v5e:2x4")) == 8
    assert slice_size(jax.devices()) == 8


SHAPES = [("v5e:4x4", 1), ("v5p:2x2x4", 1), ("tpu7x:2x2x2", 1), ("v5e:4x4", 2)]


@pytest.mark.parametrize("name, slices", SHAPES)
def test_hosts_share_rows_in_any_order(name, slices):
    """On any mesh, hosts hold equal shares of a batch that do not overlap, as `encode_share` and the loader need."""
    devices = devices_of(name, slices)
    hosts = {device.process_index for device in devices}
    for fsdp, tensor in itertools.product((1, 2, 4, 8), (1, 2)):
        mesh = make_mesh(-1, fsdp, tensor, devices=devices)
        shares = {tuple(rows_here(mesh, 64, host)) for host in hosts}
        assert len({len(share) for share in shares}) == 1
        np.testing.assert_array_equal(np.sort(np.concatenate(list(shares))), np.arange(64))
        assert shares == {tuple(rows_owned(mesh, 64, host)) for host in hosts}
    mesh = make_mesh(1, 1, -1, slices=1, devices=devices)
    assert {len(rows_here(mesh, 64, host)) for host in hosts} == {64}  # all hosts have all rows
    assert {host: len(rows_owned(mesh, 64, host)) for host in hosts} == {host: 64 * (host == 0) for host in hosts}


def test_rows_are_placed_by_the_mesh():
    mesh = make_mesh(2, 2, 2, devices=[jax.devices()[n] for n in (5, 2, 7, 0, 3, 6, 1, 4)])
    x = np.arange(24, dtype=np.float32).reshape(8, 3)
    rows = put_rows(x[rows_here(mesh, 8)], mesh)
    np.testing.assert_array_equal(rows, x)
    np.testing.assert_array_equal(fetch_rows(rows), x)
    shard = next(shard for shard in rows.addressable_shards if shard.device == mesh.devices[1, 0, 0])
    np.testing.assert_array_equal(shard.data, x[4:6])
