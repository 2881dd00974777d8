"""Comparisons of eager, torch.compile and frozen runs of one seed, and what makes them drift."""
