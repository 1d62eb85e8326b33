"""An index of candidates: on disk, memory-mapped, and searched exactly at any budget."""
