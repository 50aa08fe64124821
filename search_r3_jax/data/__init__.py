"""Collections of documents and queries: formats, TFDS data sets, subsamples and training batches."""
