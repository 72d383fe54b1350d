"""What kernels did, and the time it would take: counts, the model and the timeline."""
