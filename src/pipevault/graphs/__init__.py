"""Freezing the parts of a pipeline into compiled graphs, and running them."""
