"""What several operations share: activations, the epilogue, quantised rows, and the Triton code for each."""
