"""The load path: which graphs a pipeline needs, where they are kept, freezing those that are missing."""
