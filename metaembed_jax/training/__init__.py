"""Training: the loop, the step, the optimizer, and the figures of a run."""
