"""Search: an index of candidates on disk, searched exactly at any budget, and the same vectors in Qdrant."""
