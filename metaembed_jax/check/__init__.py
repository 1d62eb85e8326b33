"""The command `check`: compare the results of this machine's devices with float64 references, and time them."""
