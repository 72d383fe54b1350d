"""What a model loses and gains: parity with the original."""
