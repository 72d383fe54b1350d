"""What a model loses and gains: parity with the original, and which precision each layer may have."""
