"""Search: an index on disk with exact search at any budget, and the same vectors in Qdrant."""
