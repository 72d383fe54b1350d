"""`fp.Pipeline` and `fp.size_batch`."""
