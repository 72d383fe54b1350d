"""The quantised Linear layers, and what they share."""
