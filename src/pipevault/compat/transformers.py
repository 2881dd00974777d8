"""Touch points with transformers: hooks that its models put on themselves, and a warning about torchvision."""

from __future__ import annotations

import logging
import types

CAPTURE_MARK = "_output_capturing_hooks_installed"
"""Set on a model whose layers have the hooks of :func:`is_output_capturing_hook`."""

CONFIG_HASH_ATTRIBUTE = "_original_object_hash"
"""Python's hash of a generation configuration when it was read: another number in every process."""


def is_output_capturing_hook(hook: object) -> bool:
    """Return whether ``hook`` notes outputs for ``output_hidden_states`` and the like, and changes none of them.

    The first call that asks for such outputs installs them, so they say how a model was used and not what it computes.
    """
    return (
        isinstance(hook, types.FunctionType)
        and hook.__globals__.get("__name__") == "transformers.utils.output_capturing"
        and hook.__code__.co_name == "output_capturing_hook"
    )


def hide_torchvision_fallback() -> None:
    """Hide the warnings that image processors come without torchvision: diffusers imports two, whoever uses it."""
    logging.getLogger("transformers.utils.import_utils").addFilter(_is_worth_a_line)


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    return "requires torchvision (not installed); falling back to" not in record.getMessage()
