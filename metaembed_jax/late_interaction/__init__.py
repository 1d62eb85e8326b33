"""Late interaction: budgets, exact MaxSim, search in stages, and the loss that nests the vectors."""
