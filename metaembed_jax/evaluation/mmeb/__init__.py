"""MMEB (arXiv 2410.05160): 36 tasks in which each query chooses among its own documents, scored by Precision@1."""
