"""What a run would need of a TPU slice that is not there: memory, arithmetic, traffic and time, from the TPU's own compiler."""
