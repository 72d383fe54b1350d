"""`gpuless verify`: whether a kernel does what a reference does, on inputs that its author did not choose."""
