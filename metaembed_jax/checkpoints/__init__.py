"""Weights and runs on disks and in buckets: base weights, checkpoints, the folder of a run, and exports."""
