"""Evaluation: metrics in NumPy, every budget from one encoding, the evaluators (held-out splits, MMEB, mteb), and their report."""
