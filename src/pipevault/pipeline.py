"""The type of a pipeline."""

from __future__ import annotations

from typing import Protocol


class Pipeline(Protocol):
    """Any object that holds modules and calls them: of diffusers, of another library, of the program itself.

    Nothing is asked of it, so that no attribute can be taken for granted: what it has is looked up by name.
    """
