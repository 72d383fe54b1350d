"""What several parts of the package share: batches, files, text and tables, timing, plots."""
