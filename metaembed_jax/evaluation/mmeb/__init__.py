"""MMEB (arXiv 2410.05160): 36 tasks of choosing among a query's own candidates, scored by Precision@1."""
