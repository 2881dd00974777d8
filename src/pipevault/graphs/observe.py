"""Eager calls of a part under observation: what they return, what they write, and what they leave behind.

A graph knows its inputs and nothing else. So before a call is frozen, the eager part is run on copies of its arguments
while its modules are watched. What it writes into containers among its arguments, or into attributes of its modules,
becomes an output of the graph; what no graph can do (change a tensor in place, draw random numbers) is a refusal.

Writes are seen by identity and by tensors' version counters, never by comparing values before and after: a cache that
is written again with equal numbers is state all the same.
"""

from __future__ import annotations

import functools
import types
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from pipevault.compat import accelerate, diffusers
from pipevault.errors import CannotFreezeError
from pipevault.graphs.signature import ABSENT

_CONTAINERS = (tuple, list, dict, deque, set)
_MAX_DEPTH = 6
# Registered tensors are compared by themselves, hooks are the guard's business, and no forward sets its module's mode.
# Hooks that offload hold the weights themselves.
_UNWATCHED = frozenset(nn.Module().__dict__) | {accelerate.HOOK_ATTRIBUTE, diffusers.REGISTRY_ATTRIBUTE}

Path = str
"""``<module path>:<attribute>``, as in ``up_blocks.0.conv:cache``."""


@dataclass(frozen=True)
class ObservedCall:
    """One eager call, and the final values of arguments (by position or name) and attributes (by path) that it wrote
    to; :data:`ABSENT` for an attribute that was removed.
    """

    output: Any
    after: dict[int | str, Any] = field(default_factory=dict)
    state: dict[Path, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PlainCall:
    """An eager call that did nothing but return ``output``: tensors of its own and plain values. It stands for another
    call with equal arguments while the module holds the attributes that it had.
    """

    output: Any
    attributes: Attributes

    @property
    def is_as_then(self) -> bool:
        try:
            return not self.attributes.written()
        except CannotFreezeError:
            return False


def copied(tree: Any) -> Any:
    """Return ``tree`` with new containers and cloned tensors; tensors keep their strides."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, tree)


def observe(
    module: nn.Module,
    eager: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> ObservedCall:
    """Run ``eager`` on copies. Raises :class:`CannotFreezeError`; modules and random streams are then as before."""
    held_args, held_kwargs = copied((tuple(args), dict(kwargs)))
    arguments = {**dict(enumerate(held_args)), **held_kwargs}
    tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    versions = [_version(tensor) for tensor in tensors]
    before = {name: _Contents(value) for name, value in arguments.items()}
    with put_back_on_error(module) as (attributes, random_state):
        with torch.no_grad():
            output = eager(*held_args, **held_kwargs)
        if random_state.was_drawn_from():
            raise CannotFreezeError("it draws random numbers")
        if [_version(tensor) for tensor in tensors] != versions:
            raise CannotFreezeError("it changes a tensor among its arguments in place")
        after = {name: value for name, value in arguments.items() if not before[name].holds(value)}
        # Restoring refills containers, so that the values are held.
        return ObservedCall(output, after, {path: held(value) for path, value in attributes.written().items()})


def observe_plain(
    module: nn.Module, eager: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, PlainCall | None]:
    """Make the call as it is given and return its output; with it, the call if all that it did was to return values.

    That stays open where changes in place are not counted, and where gradients are asked for.
    """
    arguments: dict[int | str, Any] = {**dict(enumerate(args)), **dict(kwargs.items())}
    tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or any(map(torch.is_inference, tensors)):
        return eager(*args, **kwargs), None
    versions = [_version(tensor) for tensor in tensors]
    before = {name: _Contents(value) for name, value in arguments.items()}
    attributes, random_state = Attributes(module, values=False), RandomState()
    output = eager(*args, **kwargs)
    call = PlainCall(output, attributes)
    is_plain = (
        [_version(tensor) for tensor in tensors] == versions
        and all(before[name].holds(value) for name, value in arguments.items())
        and _is_separate(output, arguments)
        and call.is_as_then
        and not random_state.was_drawn_from()
    )
    return output, replace(call, output=copied(output)) if is_plain else None


def _is_separate(output: Any, arguments: Any) -> bool:
    """Return True if ``output`` holds plain values, and tensors that share no memory with ``arguments``."""
    leaves, given = pytree.tree_leaves(output), pytree.tree_leaves(arguments)
    tensors = [leaf for leaf in (*leaves, *given) if isinstance(leaf, torch.Tensor)]
    if any(type(tensor) is not torch.Tensor or tensor.layout is not torch.strided for tensor in tensors):
        return False
    taken = {leaf.untyped_storage().data_ptr() for leaf in given if isinstance(leaf, torch.Tensor) and leaf.numel()}
    return all(
        leaf.untyped_storage().data_ptr() not in taken
        if isinstance(leaf, torch.Tensor)
        else leaf is None or isinstance(leaf, (bool, int, float, str))
        for leaf in leaves
    )


@contextmanager
def put_back_on_error(module: nn.Module) -> Iterator[tuple[Attributes, RandomState]]:
    """Note the attributes of ``module`` and the random streams, and put all of them back if the block raises."""
    attributes, random_state = Attributes(module), RandomState()
    try:
        yield attributes, random_state
    except BaseException:  # whatever it was goes on; the call that follows must find everything as it was
        attributes.restore_all()
        random_state.restore()
        raise


class RandomState:
    """torch's random streams at one moment."""

    def __init__(self) -> None:
        self._states = self._read()

    def was_drawn_from(self) -> bool:
        return not all(torch.equal(a, b) for a, b in zip(self._states, self._read(), strict=True))

    def restore(self) -> None:
        cpu, *gpus = self._states
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)

    @staticmethod
    def _read() -> list[torch.Tensor]:
        has_gpus = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if has_gpus else ())]


class Attributes:
    """The plain attributes and buffers of a module tree at one moment, to compare with and to restore."""

    def __init__(self, module: nn.Module, *, values: bool = True) -> None:
        """``values``: hold copies of what :meth:`restore_all` would have to put back."""
        self._module = module
        self._before = {path: _Contents(value) for path, value in _walk(module)}
        self._tensors = [(name, tensor, _version(tensor)) for name, tensor in named_tensors(module)]
        self._buffers = [(own, dict(own)) for child in module.modules() if (own := child._buffers)]
        small = [tensor for _, own in self._buffers for tensor in own.values() if tensor is not None]
        small += [tensor for contents in self._before.values() for tensor, _ in contents.tensors]
        small = [tensor for tensor in small if values and not tensor.is_meta]
        self._values = [(tensor, tensor.detach().clone(), _version(tensor)) for tensor in small]

    def written(self) -> dict[Path, Any]:
        """Return the attributes that were set, or whose containers were changed; refuse what no graph can write to."""
        for (name, tensor, version), (_, live) in zip(self._tensors, named_tensors(self._module), strict=False):
            if tensor.is_meta or live.is_meta:  # an offloading hook moves it about
                continue
            if live is not tensor or _version(live) != version:
                raise CannotFreezeError(f"it changes its tensor {name}")
        for path, contents in self._before.items():
            if contents.changed_in_place():
                raise CannotFreezeError(f"it changes {path.lstrip(':')} in place")
        now = dict(_walk(self._module))
        gone = dict.fromkeys(self._before.keys() - now.keys(), ABSENT)
        written = {p: v for p, v in now.items() if p not in self._before or not self._before[p].holds(v)}
        return written | gone

    def restore(self, paths: Sequence[Path]) -> None:
        """Set attributes back to what they were; containers keep their identity."""
        for path in paths:
            known = self._before.get(path)
            put_state(self._module, path, ABSENT if known is None else known.restored())

    def restore_all(self) -> None:
        """Set every attribute back, and the values of buffers and of tensors in attributes too."""
        self.restore(tuple(dict(_walk(self._module)).keys() | self._before.keys()))
        for own, before in self._buffers:
            own.clear()
            own.update(before)
        for tensor, value, version in self._values:
            if _version(tensor) != version:
                with torch.no_grad():
                    tensor.copy_(value)


class UntouchableValue:
    """A value that raises :class:`TypeError` where code uses it, as a container or as a number."""

    def _refuse(self, *_: Any) -> Any:
        raise TypeError("this value must not be used")

    __getattr__ = __getitem__ = __setitem__ = __delitem__ = __contains__ = _refuse
    __len__ = __iter__ = __bool__ = __call__ = __float__ = __int__ = __index__ = _refuse


def _owner(module: nn.Module, path: Path) -> tuple[dict[str, Any], str]:
    where, _, name = path.rpartition(":")
    return module.get_submodule(where).__dict__, name


def read_state(module: nn.Module, paths: Iterable[Path]) -> dict[Path, Any]:
    """Return the attributes at ``paths``, :data:`ABSENT` for one that is not there."""
    owners = {path: _owner(module, path) for path in paths}
    return {path: owner.get(name, ABSENT) for path, (owner, name) in owners.items()}


def put_state(module: nn.Module, path: Path, value: Any) -> None:
    owner, name = _owner(module, path)
    if value is ABSENT:
        owner.pop(name, None)
    else:
        owner[name] = value


def write_state(module: nn.Module, path: Path, value: Any) -> None:
    """Set an attribute; a container that is there already is filled instead, as the eager code would have done."""
    put_state(module, path, write_back(read_state(module, [path])[path], value))


def write_back(target: Any, value: Any) -> Any:
    """Give the container ``target`` the content of ``value``, nested ones too, and return what now holds it."""
    if type(target) is not type(value) or target is value:
        return value
    if isinstance(target, (list, deque, dict)):
        old = dict(_items(target))
        return _filled(target, [(key, write_back(old.get(key), item)) for key, item in _items(value)])
    if isinstance(target, tuple) and len(target) == len(value):
        items = [write_back(old, new) for old, new in zip(target, value, strict=True)]
        return target if all(a is b for a, b in zip(items, target, strict=True)) else _like(value, items)
    return value


def same_values(one: Any, other: Any, _above: tuple[int, ...] = ()) -> bool:
    """Return whether two values of attributes are equal, tensors by their numbers."""
    if one is other or id(one) in _above:
        return True
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same_kind = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
        return same_kind and bool(torch.equal(one, other))
    if type(one) is not type(other) or isinstance(one, nn.Module):
        return False
    if _is_open(one) and not isinstance(one, set):
        ours, theirs = _items(one), _items(other)
        if [key for key, _ in ours] != [key for key, _ in theirs]:
            return False
        above = (*_above, id(one))
        return all(same_values(a, b, above) for (_, a), (_, b) in zip(ours, theirs, strict=True))
    try:
        return bool(one == other)
    except (RuntimeError, ValueError, TypeError):  # arrays have no single truth value
        return False


def iter_tensors(module: nn.Module) -> Iterator[tuple[list[str | int], torch.Tensor]]:
    """Yield every tensor that an attribute of the tree holds and no module has registered, with the steps to it:
    the module's path, the attribute, and then indices, keys and attributes of objects.
    """
    for path, value in _walk(module):
        where, _, name = path.rpartition(":")
        yield from _tensors_in(value, [where, name], ())


def follow(module: nn.Module, steps: Sequence[str | int]) -> torch.Tensor | None:
    """Return the tensor at the end of ``steps``, as :func:`iter_tensors` gives them; ``None`` where there is none."""
    try:
        value: Any = module.get_submodule(str(steps[0])).__dict__
        for step in steps[1:]:
            value = dict(_named_items(value))[step]
    except (AttributeError, LookupError, TypeError):
        return None
    return value if isinstance(value, torch.Tensor) else None


def _named_items(value: Any) -> Iterator[tuple[str | int, Any]]:
    if _is_open(value) and not isinstance(value, set):
        yield from ((key if isinstance(key, (str, int)) else repr(key), item) for key, item in _items(value))


def _tensors_in(
    value: Any, steps: list[str | int], above: tuple[int, ...]
) -> Iterator[tuple[list[str | int], torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield steps, value
    elif len(above) < _MAX_DEPTH and id(value) not in above:
        for step, item in _named_items(value):
            yield from _tensors_in(item, [*steps, step], (*above, id(value)))


def _walk(module: nn.Module) -> Iterator[tuple[Path, Any]]:
    for where, child in module.named_modules():
        for name, value in list(child.__dict__.items()):
            if name not in _UNWATCHED and not isinstance(value, (nn.Module, types.FunctionType, types.MethodType)):
                yield f"{where}:{name}", value


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters and the buffers of ``module``, tied ones under each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


class _Contents:
    """The content of a value, and the versions of its tensors; held, so that no identity can be used again."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.tensors: list[tuple[torch.Tensor, int]] = []
        self._holders: list[tuple[Any, list[tuple[Any, Any]]]] = []
        self._note(value, ())

    def _note(self, value: Any, above: tuple[int, ...]) -> None:
        if isinstance(value, torch.Tensor):
            self.tensors.append((value, _version(value)))
        elif _is_open(value) and len(above) < _MAX_DEPTH and id(value) not in above:
            items = _items(value)
            self._holders.append((value, items))
            for _, item in items:
                self._note(item, (*above, id(value)))

    def changed_in_place(self) -> bool:
        return any(_version(tensor) != version for tensor, version in self.tensors)

    def holds(self, value: Any) -> bool:
        if not _is_same(self.value, value):
            return False
        return not self.changed_in_place() and all(_are_same(items, _items(one)) for one, items in self._holders)

    def restored(self) -> Any:
        for holder, items in self._holders:
            if not _are_same(items, _items(holder)):  # some refuse to be filled, such as diffusers' FrozenDict
                _filled(holder, items)
        return self.value


def _is_same(before: Any, value: Any) -> bool:
    """Small numbers and texts may be made again; only another value is a write."""
    plain = (bool, int, float, str, bytes, type(None))
    return before is value or (isinstance(value, plain) and type(before) is type(value) and before == value)


def _are_same(before: list[tuple[Any, Any]], items: list[tuple[Any, Any]]) -> bool:
    pairs = zip(before, items, strict=False)
    return len(before) == len(items) and all(a == b and _is_same(one, other) for (a, one), (b, other) in pairs)


def _is_open(value: Any) -> bool:
    return isinstance(value, _CONTAINERS) or _is_object(value)


def _is_object(value: Any) -> bool:
    """Return True for an object that may hold what a call leaves: no module, class or function, no library's own."""
    if isinstance(value, (nn.Module, type, types.FunctionType, types.MethodType, torch.Tensor, functools.partial)):
        return False
    home = type(value).__module__
    return hasattr(value, "__dict__") and home != "builtins" and not home.startswith(("torch.", "numpy"))


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, set):
        return [(item, item) for item in sorted(value, key=id)]
    return list(enumerate(value)) if isinstance(value, _CONTAINERS) else list(vars(value).items())


def _filled(value: Any, items: list[tuple[Any, Any]]) -> Any:
    if isinstance(value, dict):
        value.clear()
        value.update(dict(items))  # of pairs, a Counter would count them
    elif isinstance(value, (list, deque)):
        value.clear()
        value.extend(item for _, item in items)
    elif isinstance(value, set):
        value.clear()
        value.update(item for _, item in items)
    elif not isinstance(value, tuple):
        vars(value).clear()
        vars(value).update(items)
    return value


def held(value: Any, _memo: dict[int, Any] | None = None) -> Any:
    """Return ``value`` as it is now, however its containers and objects change later."""
    memo = {} if _memo is None else _memo
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, dict):
        twin: Any = defaultdict(value.default_factory) if isinstance(value, defaultdict) else type(value)()
        memo[id(value)] = twin
        twin.update({name: held(item, memo) for name, item in value.items()})
        return twin
    if isinstance(value, deque):
        return deque((held(item, memo) for item in value), value.maxlen)
    if type(value) in (list, set) or isinstance(value, tuple):
        return _like(value, [held(item, memo) for item in value])
    if _is_object(value):
        try:
            twin = memo[id(value)] = object.__new__(type(value))
        except TypeError:  # an object that only its own class can make: its changes are not told apart
            return value
        twin.__dict__.update({name: held(item, memo) for name, item in vars(value).items()})
        return twin
    return value


def _like(value: Any, items: list[Any]) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*items)
    return type(value)(items) if type(value) in (list, set, tuple) else value


def _version(tensor: torch.Tensor) -> int:
    """Inference tensors count no versions; a change to them in place shows when the graph is compared."""
    return 0 if tensor.is_inference() else tensor._version
