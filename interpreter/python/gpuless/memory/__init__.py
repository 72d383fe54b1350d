"""The memory of a kernel's arguments: which it may touch, copies with guards, tensor maps."""
