"""Hard negatives of a source, found with a model: documents that it ranks high and that answer no query they are given."""
