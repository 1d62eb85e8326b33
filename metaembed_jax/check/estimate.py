"""An estimate of the training step: by `plan` on a TPU slice, by the published peaks on other chips."""

from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from metaembed_jax.chips import TPU_KINDS, peak
from metaembed_jax.config.run import RunConfig
from metaembed_jax.errors import UserError
from metaembed_jax.planning.planner import make_plan
from metaembed_jax.planning.topology import topology


class Estimate(NamedTuple):
    """A lower bound of a step's time, and its memory.

    Attributes:
      seconds: time at the peaks; None if they are not known.
      bound: the slowest resource: compute, HBM or ICI.
      bytes: bytes of a device; None without the TPU compiler.
      source: origin of the figures, or the reason why they are missing.
    """

    seconds: float | None
    bound: str
    bytes: int | None
    source: str


def estimate(config: RunConfig, mesh: Mesh, flops: float) -> Estimate:
    """Return the figures of `plan` for the step on this TPU slice; on other devices, the time of its FLOPs at the peak.

    Args:
      flops: FLOPs of the model, in a step over all devices.
    """
    device = mesh.devices.flat[0]
    peaks = peak(device)
    if device.platform != "tpu":
        if peaks is None:
            return Estimate(None, "", None, f"no peaks are known of {device.device_kind}")
        return Estimate(flops / mesh.size / peaks.flops, "compute", None, "FLOPs at the peak")
    try:
        plan = make_plan(config, "train", topology(slice_name(list(mesh.devices.flat))))
    except Exception as error:  # libtpu and the parser of its text raise anything; the table needs no plan
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Estimate(None, "", None, f"plan: {reason}")
    return Estimate(plan.seconds[plan.binds], plan.binds, plan.total_bytes, f"plan --topology={plan.topology}")


def slice_name(devices: Sequence) -> str:
    """Return the name of a slice of TPU devices for `plan`, such as v5e:2x4.

    Raises:
      UserError: a kind of TPU that `plan` does not know.
    """
    kind = TPU_KINDS.get(devices[0].device_kind)
    if kind is None:
        raise UserError(f"{devices[0].device_kind}: expected one of {', '.join(sorted(TPU_KINDS))}")
    sides = [len({device.coords[axis] for device in devices}) for axis in range(3)]
    flat = kind in ("v5e", "v6e")
    return f"{kind}:" + "x".join(str(side) for side in (sorted(sides[:2]) if flat else sorted(sides)))
