"""Retrieval tasks of mteb, page retrieval (ViDoRe) first of all, with this package's model and scorer."""
