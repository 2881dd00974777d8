"""All that touches private parts of other libraries: a file for each library, a small function for each touch point.

Private parts change without notice. ``tests/compat`` has a contract test for each function, so that a release that
moved something fails there, by name, and not in the middle of a load. No library is imported before a call.
"""
