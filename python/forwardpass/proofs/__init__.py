"""What a model's own code says of its layers: read, and then run. Nothing is rewritten that is not shown here first."""
