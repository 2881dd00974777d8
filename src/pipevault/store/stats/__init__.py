"""Counting what happens in a vault."""
