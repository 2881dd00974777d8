"""Proof of what a pipeline drew: records on disk, replay, comparisons, goldens, sweeps."""
