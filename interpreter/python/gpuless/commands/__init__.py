"""The commands of `python -m gpuless`."""
