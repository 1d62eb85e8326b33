"""Evaluation: retrieval metrics (pure NumPy), the sweep over budgets, its costs, and the report of both."""
