"""What a swap does to attention: its modules, their projections, the caches they read, and encoders without padding."""
