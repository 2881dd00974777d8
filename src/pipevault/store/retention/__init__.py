"""Keeping a vault small: pins, uses, removal, pruning."""
