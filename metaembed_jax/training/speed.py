"""The speed of a run: pairs and FLOPs a second, the share of the chips' peak, and the time left."""

from jax.sharding import Mesh

from metaembed_jax.batch.training import StepShape
from metaembed_jax.chips import peak
from metaembed_jax.config.run import RunConfig
from metaembed_jax.flops import train_flops

SHOWN = {"samples_per_second": "pairs/s", "flops_per_second": "FLOP/s", "mfu": "MFU"}  # in the terminal


class Speed:
    """The rates of a run, between two readings.

    Args:
      shape: shape of the run's batches.
      first_step: the step that the run starts or resumes from.
    """

    def __init__(self, config: RunConfig, shape: StepShape, mesh: Mesh, first_step: int):
        self._pairs, self._steps, self._last = config.rows.batch_size, config.schedule.steps, first_step
        self._flops = train_flops(config, shape).model
        peaks = [peak(device) for device in mesh.devices.flat]
        peak_flops = [figures.flops for figures in peaks if figures is not None]
        self._peak_flops = sum(peak_flops) if len(peak_flops) == len(peaks) else None
        self._spent, self._steps_done = 0.0, 0

    def read(self, step: int, spent: dict[str, float]) -> dict[str, float]:
        """Return the rates from the last reading to `step`.

        `mfu` (arXiv 2204.02311) is the FLOPs of the forward and backward passes, with padding and without recomputation, over the
        published bfloat16 peak. It is missing if the peak is unknown. Validation and checkpoints count only in the time left.

        Args:
          spent: seconds by activity, from `profile.Stopwatch.read`.
        """
        steps, seconds = step - self._last, spent["seconds/input"] + spent["seconds/step"]
        self._last = step
        self._spent += sum(spent.values()) - spent["seconds/compile"]
        self._steps_done += steps
        flops = self._flops * steps / seconds
        rates = {"samples_per_second": self._pairs * steps / seconds, "flops_per_second": flops}
        if self._peak_flops:
            rates["mfu"] = flops / self._peak_flops
        return rates | {"seconds_left": self._spent / self._steps_done * (self._steps - step)}


def shown(rates: dict[str, float]) -> dict[str, float]:
    """Return the rates to show next to the progress bar, by short name; the bar itself shows the time left."""
    return {short: rates[name] for name, short in SHOWN.items() if name in rates}
