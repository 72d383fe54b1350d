"""The witnesses' launches: kernels of Triton that nobody here wrote the code of, with what they must give."""

CASES = {}
