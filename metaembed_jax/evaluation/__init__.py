"""Evaluation: metrics, the evaluators (held-out splits, MMEB, mteb), which encode once for all budgets, and their report."""
