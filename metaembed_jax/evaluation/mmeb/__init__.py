"""MMEB (arXiv 2410.05160): 36 tasks in which each query chooses among documents of its own, scored by Precision@1."""
