"""Scoring with several vectors an item: budgets, exact MaxSim, and the loss that nests them."""
