"""Whose files are trusted: owners and signatures."""
