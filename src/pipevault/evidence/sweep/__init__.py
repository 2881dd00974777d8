"""Sweeps: how much the seed moves what a model draws."""
