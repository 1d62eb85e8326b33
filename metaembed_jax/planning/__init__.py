"""Memory, FLOPs, traffic and time of a run on a TPU slice, from the TPU compiler; no TPU is needed."""
