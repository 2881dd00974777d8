"""Stores, and several of them in order."""
