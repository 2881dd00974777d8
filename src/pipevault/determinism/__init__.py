"""Controlling and recording every layer of randomness."""
