"""Layers of a model that run as one operation."""
