"""A call of a part as a function of its leaves: what is traced, and what the traced graph is compared with.

The leaves are the tensors and numbers of the arguments and of the state on the modules. The result is a tree of what
the part returns, of the arguments that it wrote to, and of the state that it left.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pipevault.errors import CannotFreezeError
from pipevault.graphs.check import compare_trees
from pipevault.graphs.observe import put_state, read_state
from pipevault.graphs.signature import ABSENT, UNREAD, CallSignature, DescribedCall, Leaf, rebuild


@dataclass(frozen=True)
class Program:
    """``written`` names the arguments that the call writes to, by position or name. ``overrides`` are keyword arguments
    that the eager part is given and callers do not give.
    """

    signature: CallSignature
    written: tuple[int | str, ...] = ()
    overrides: Mapping[str, Any] | None = None

    def values(self, leaves: Sequence[Any]) -> list[Any]:
        """Return the arguments and the state that ``leaves`` are the leaves of."""
        remaining = iter(leaves)
        shapes = (self.signature.arguments, *(shape for _, shape in self.signature.state))
        return [rebuild(shape, remaining) for shape in shapes]

    def run(self, module: nn.Module, eager: Callable[..., Any], leaves: Sequence[Any]) -> dict[str, Any]:
        """Call ``eager`` on arguments rebuilt from ``leaves``; state on the modules is as it was afterwards."""
        (args, kwargs), *state = self.values(leaves)
        with _state_set(module, dict(zip(self.signature.state_paths, state, strict=True))):
            output = eager(*args, **{**kwargs, **(self.overrides or {})})
            after = read_state(module, self.signature.state_paths)
        written = {str(name): args[name] if isinstance(name, int) else kwargs[name] for name in self.written}
        return self.result(output, written, after)

    @staticmethod
    def result(
        output: Any, written: Mapping[str, Any] | None = None, state: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the result tree of a call that returned ``output``."""
        return {"output": output, "arguments": written or {}, "state": state or {}}


@contextmanager
def _state_set(module: nn.Module, state: Mapping[str, Any]) -> Iterator[None]:
    before = read_state(module, state)
    try:
        for path, value in state.items():
            put_state(module, path, None if value is UNREAD else value)
        yield
    finally:
        for path, value in before.items():
            put_state(module, path, value)


def copied_leaves(leaves: Sequence[Leaf]) -> list[Leaf]:
    """Return ``leaves`` with cloned tensors."""
    return [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def varied_leaves(leaves: Sequence[Leaf], numbers: Collection[int]) -> list[Leaf]:
    """Return other values of the same shapes: drawn ones mixed into floating point, whole numbers in reverse order, and
    second values of the Python numbers at ``numbers``. They are the same each time, and no random stream is changed.
    """
    generator = torch.Generator().manual_seed(0)
    others = [_varied(leaf, generator) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return with_second_values(others, numbers)


def shaken_leaves(leaves: Sequence[Leaf]) -> list[Leaf]:
    """Return ``leaves`` with their floating-point tensors changed in the last bits."""
    return [
        leaf * (1 + 2 * torch.finfo(leaf.dtype).eps)
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        else leaf
        for leaf in copied_leaves(leaves)
    ]


def second_value(number: int | float) -> int | float:
    """Return another number of the type, far enough away to show in an output."""
    if isinstance(number, int):
        return number + 1
    return 0.75 if number == 0.5 else number * 0.5 + 0.25


def with_second_values(leaves: Sequence[Leaf], indices: Collection[int]) -> list[Leaf]:
    """Return ``leaves`` with the second values of the numbers at ``indices``."""
    return [
        second_value(leaf) if index in indices and not isinstance(leaf, torch.Tensor) else leaf
        for index, leaf in enumerate(leaves)
    ]


def number_tensor(number: int | float, leaves: Sequence[Leaf], device: torch.device) -> torch.Tensor:
    """Return ``number`` as the tensor without dimensions that a graph takes: it promotes like a Python number."""
    if isinstance(number, int):
        return torch.tensor(number, dtype=torch.int64, device=device)
    wide = any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in leaves)
    return torch.tensor(number, dtype=torch.float64 if wide else torch.float32, device=device)


def with_number_tensors(
    leaves: Sequence[Leaf], indices: Sequence[int], device: torch.device
) -> list[torch.Tensor | int | float]:
    """Return ``leaves`` with tensors in the place of the numbers at ``indices``."""
    result: list[Any] = list(leaves)
    for index in indices:
        result[index] = number_tensor(result[index], leaves, device)
    return result


def free_numbers(
    program: Program, module: nn.Module, eager: Callable[..., Any], call: DescribedCall, device: torch.device
) -> tuple[int, ...]:
    """Return the indices of the numbers that only enter arithmetic, so that a graph may take them as inputs: the eager
    part is run with tensors in their place, at the captured value and at a second one.
    """

    def are_free(indices: Sequence[int]) -> bool:
        other = with_second_values(call.leaves, indices)
        return all(_is_arithmetic(program, module, eager, leaves, indices, device) for leaves in (call.leaves, other))

    if not call.numbers or are_free(call.numbers):
        return call.numbers
    if len(call.numbers) == 1:
        return ()
    free = tuple(index for index in call.numbers if are_free([index]))
    return free if not free or are_free(free) else ()


def _is_arithmetic(
    program: Program,
    module: nn.Module,
    eager: Callable[..., Any],
    leaves: Sequence[Leaf],
    indices: Sequence[int],
    device: torch.device,
) -> bool:
    plain = copied_leaves(leaves)
    tensors = with_number_tensors(copied_leaves(leaves), indices, device)
    try:
        with torch.no_grad():
            expected = program.run(module, eager, plain)
            with _NoLookAtValues():  # type: ignore[no-untyped-call]
                actual = program.run(module, eager, tensors)
    except Exception:  # whatever the part raises for a tensor, or for another value, the number steers it
        return False
    back = {id(tensors[index]): leaves[index] for index in indices}
    leaves_there, tree = pytree.tree_flatten(actual)
    restored = pytree.tree_unflatten([back.get(id(leaf), leaf) for leaf in leaves_there], tree)
    return compare_trees(expected, restored, tolerance=1e-4, same_non_finite=True).passed


class _NoLookAtValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises where code asks a tensor for its value, as a condition or an index does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise CannotFreezeError("the value of a tensor is read")
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Results:
    """The way in which the result tree of a program is put together.

    ``leaves`` has an item for each leaf of the tree: ``["tensor"]``, the next tensor that the graph returns;
    ``["leaf", n]``, the n-th leaf of the call itself; ``["value", value]``, a constant; ``["absent"]``, an attribute
    that is not there. ``tree`` is the tree as ``torch.utils._pytree.treespec_dumps`` writes it.
    """

    leaves: tuple[tuple[Any, ...], ...]
    tree: str

    @classmethod
    def of(cls, result: Mapping[str, Any], leaves: Sequence[Any]) -> Results:
        """Describe ``result``, which came from running a program on ``leaves``. Refuses leaves of an unknown kind."""
        own = {id(leaf): index for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
        found, tree = pytree.tree_flatten(result)
        described: list[tuple[Any, ...]] = []
        for leaf in found:
            if isinstance(leaf, torch.Tensor):
                described.append(("leaf", own[id(leaf)]) if id(leaf) in own else ("tensor",))
            elif leaf is None or isinstance(leaf, (bool, int, float, str)):
                described.append(("value", leaf))
            elif leaf is ABSENT:
                described.append(("absent",))
            else:
                raise CannotFreezeError(f"it returns a {type(leaf).__module__}.{type(leaf).__qualname__}")
        try:
            return cls(tuple(described), pytree.treespec_dumps(tree))
        except (NotImplementedError, TypeError, ValueError) as error:
            raise CannotFreezeError(f"its output cannot be written down: {error}") from error

    def tensors(self, result: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
        """Return the tensors that a graph must return for ``result``."""
        found = pytree.tree_leaves(result)
        if len(found) != len(self.leaves):
            raise CannotFreezeError(f"traced, it returns {len(found)} values instead of {len(self.leaves)}")
        pairs = list(zip(self.leaves, found, strict=True))
        symbolic = (torch.SymInt, torch.SymFloat, torch.SymBool)
        if any(kind[0] == "value" and isinstance(leaf, symbolic) for kind, leaf in pairs):
            raise CannotFreezeError("it returns a number that depends on sizes")
        kept = [leaf for kind, leaf in pairs if kind[0] == "tensor"]
        if not all(isinstance(leaf, torch.Tensor) for leaf in kept):
            raise CannotFreezeError("traced, it returns values of other kinds")
        return tuple(kept)


def _varied(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if tensor.is_floating_point() and tensor.dim() > 1:
        values = tensor.detach().float()
        spread = float(values.std()) if values.numel() > 1 else 0.0
        spread = spread if 0.0 < spread < float("inf") else 1.0
        drawn = torch.randn(tensor.shape, generator=generator).to(tensor.device)
        mixed = torch.empty_like(tensor, memory_format=torch.preserve_format)
        return mixed.copy_(values * 0.6 + drawn * (0.4 * spread))
    if tensor.dim() and not tensor.is_complex() and not tensor.is_floating_point():
        return tensor.detach().flip(-1).clone()
    return tensor.detach().clone()


def is_degenerate(leaves: Sequence[Leaf]) -> bool:
    """Return whether an input of more than one dimension holds one number only, such as an image all black, of which
    normalisation makes mere rounding, so that eager code and a right graph may differ at will.
    """
    return any(
        isinstance(leaf, torch.Tensor)
        and leaf.is_floating_point()
        and leaf.dim() > 1
        and leaf.numel() > 1
        and bool((leaf == leaf.reshape(-1)[0]).all())
        for leaf in leaves
    )
