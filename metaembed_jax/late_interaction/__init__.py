"""Scores of items with several vectors: budgets, exact MaxSim, and the loss that nests the vectors."""
