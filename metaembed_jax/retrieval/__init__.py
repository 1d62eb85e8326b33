"""Search: what is encoded is stored, and the best of it found."""
