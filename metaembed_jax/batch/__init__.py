"""Items, rows and batches: a query or document becomes arrays, and several of them share a packed row."""
