"""What is asked of a pipeline and what it returns: shapes, samples, outputs."""
