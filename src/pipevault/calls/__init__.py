"""The calls of a pipeline and what they return: shapes, samples, outputs."""
