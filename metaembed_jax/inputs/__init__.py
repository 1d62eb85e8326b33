"""Processors of queries and documents, with images and texts, for all families of backbones."""
