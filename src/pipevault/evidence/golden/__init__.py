"""Goldens: fixed-seed regression tests of what a model draws."""
