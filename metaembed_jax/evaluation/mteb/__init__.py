"""Retrieval tasks of mteb, page retrieval (ViDoRe) first of all, with our model and our scorer."""
