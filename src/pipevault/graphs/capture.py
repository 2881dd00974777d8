"""Recording the eager calls of a part, and noticing those that no graph can stand in for.

A graph knows its arguments and nothing else: a call that changes an argument, or whose arguments are of an unknown
kind, or that returns one, is refused with the reason, and its part stays eager.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from pipevault.graphs.signature import Signature, UnsupportedArgumentError, describe_call

MAX_GRAPHS = 16


@dataclass
class CapturedCall:
    """One eager call: copies of its arguments from before, and of its output from after."""

    signature: Signature
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class Recorder:
    """The captured calls of one part; ``refusal`` is why it cannot be frozen, or empty."""

    def __init__(self) -> None:
        self.calls: list[CapturedCall] = []
        self.refusal = ""

    def record(self, eager: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``eager(*args, **kwargs)``, kept with copies of its arguments from before and its output."""
        if self.refusal:
            return eager(*args, **kwargs)
        try:
            signature, tensors = describe_call(args, kwargs)
        except UnsupportedArgumentError as error:
            self.refuse(str(error))
            return eager(*args, **kwargs)
        versions = [_version(tensor) for tensor in tensors]
        copied_args, copied_kwargs = _copy_tensors((args, kwargs))
        output = eager(*args, **kwargs)
        try:
            after, tensors_after = describe_call(args, kwargs)
        except UnsupportedArgumentError as error:
            self.refuse(f"it changes its arguments: afterwards {error}")
            return output
        if after != signature or any(a is not b for a, b in zip(tensors, tensors_after, strict=True)):
            self.refuse("it changes a container among its arguments")
        elif [_version(tensor) for tensor in tensors] != versions:
            self.refuse("it changes a tensor among its arguments in place")
        else:
            self.calls.append(CapturedCall(signature, copied_args, copied_kwargs, _copy_tensors(output)))
            if len(self.signatures()) > MAX_GRAPHS:
                self.refuse(f"it was called with more than {MAX_GRAPHS} signatures, so its arguments vary in value")
        return output

    def refuse(self, reason: str) -> None:
        self.refusal = reason
        self.calls.clear()

    def signatures(self) -> tuple[Signature, ...]:
        """Captured signatures in the order of their first call."""
        return tuple(dict.fromkeys(call.signature for call in self.calls))


def _copy_tensors(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, tree)


def _version(tensor: torch.Tensor) -> int:
    """Inference tensors count no versions; a change to them in place shows in the whole-pipeline check."""
    return 0 if tensor.is_inference() else tensor._version
