"""The version of gpuless, also that of its library: csrc/gpuless.h."""

__version__ = "0.1.0"
