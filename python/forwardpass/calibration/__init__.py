"""What layers are fed, as batches show it, and what becomes of it in their scales and weights."""
