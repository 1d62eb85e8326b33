"""The command `check`: what this machine's devices compute, against float64 references, and how fast."""
