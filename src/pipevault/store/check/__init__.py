"""Verifying a whole vault."""
