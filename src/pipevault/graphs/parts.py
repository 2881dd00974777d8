"""Which modules of a pipeline are parts, and putting frozen ones in their places.

A part may lie anywhere: in an attribute or a slot, in a list or dictionary of modules, inside another module, in a
pipeline that the pipeline holds. One module in several places is one part, replaced everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from pipevault.compat.onediffx import compile_parts, listed_parts
from pipevault.errors import SettingsError
from pipevault.graphs.adapters import adapter_of
from pipevault.graphs.part import BACKEND, FrozenPart, part_state, release, unfrozen
from pipevault.graphs.state import PartOptions, PartState
from pipevault.pipeline import Pipeline

NEVER_PARTS = frozenset({"safety_checker", "feature_extractor", "watermark"})
_MAX_DEPTH = 3


def pipeline_modules(pipe: Pipeline) -> dict[str, nn.Module]:
    """The top-level modules of a pipeline by name."""
    return {name: value for name, value in members(pipe) if isinstance(value, nn.Module)}


def members(pipe: Pipeline) -> Iterator[tuple[str, Any]]:
    """Yield name and value of what an object holds: attributes, slots, and sub-modules of one that is a module."""
    own = getattr(pipe, "__dict__", {})
    registered = _registered(pipe, own) if isinstance(getattr(type(pipe), "components", None), property) else ()
    modules = own.get("_modules", {}) if isinstance(pipe, nn.Module) else {}
    declared = [cls.__dict__.get("__slots__", ()) for cls in type(pipe).__mro__]
    slots = [name for names in declared for name in ((names,) if isinstance(names, str) else names)]
    for name in dict.fromkeys((*registered, *modules, *own, *(slot for slot in slots if not slot.startswith("__")))):
        yield name, modules.get(name, getattr(pipe, name, None))


def _registered(pipe: Any, own: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a pipeline's components in their order, which diffusers takes a quarter of a millisecond to find."""
    key = (type(pipe), tuple(own))
    names = _REGISTERED.get(key)
    if names is None:
        if len(_REGISTERED) >= _MAX_REGISTERED:
            _REGISTERED.clear()
        names = _REGISTERED[key] = tuple(pipe.components)
    return names


_REGISTERED: dict[tuple[Any, ...], tuple[str, ...]] = {}
_MAX_REGISTERED = 256


def find_parts(pipe: Pipeline, wanted: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Return every part by its dotted name; with ``wanted`` those, which may be any modules inside the pipeline.

    Raises :class:`SettingsError` if ``wanted``, or an adapter, names one that is not there.
    """
    adapter = adapter_of(pipe)
    named = adapter.part_names(pipe) if adapter is not None else None
    if wanted is None and named is not None:
        found = {name: get_part(pipe, name) for name in named}
        if missing := [name for name, module in found.items() if not isinstance(module, nn.Module)]:
            raise SettingsError(
                f"The adapter of {type(pipe).__name__} names parts that it does not have: {', '.join(missing)}. "
                "Correct register_adapter."
            )
        return found
    parts = _distinct(_candidates(pipe))
    if wanted is None:
        return parts
    known = {**parts, **{name: get_part(pipe, name) for name in wanted if name not in parts}}
    if unknown := [name for name in wanted if not isinstance(known[name], nn.Module)]:
        raise SettingsError(
            f"{type(pipe).__name__} has no part {', '.join(unknown)}. Its parts: {', '.join(parts) or 'none'}."
        )
    return _distinct((name, module) for name, module in known.items() if name in wanted)


def _distinct(named: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """Each module by the first of its names."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in named:
        found.setdefault(id(unfrozen(module)), (name, module))
    return dict(found.values())


def _candidates(pipe: Pipeline) -> Iterator[tuple[str, nn.Module]]:
    covered = set()
    for name in listed_parts():
        module = get_part(pipe, name)
        if isinstance(module, nn.Module):
            covered.add(name.partition(".")[0])
            yield name, module
    yield from _inside(pipe, "", covered, 0, {id(pipe)})


def _inside(owner: Any, prefix: str, covered: set[str], depth: int, above: set[int]) -> Iterator[tuple[str, nn.Module]]:
    for name, value in members(owner):
        if name in covered or name in NEVER_PARTS:
            continue
        yield from _from_value(value, f"{prefix}{name}", depth, above)


def _from_value(value: Any, name: str, depth: int, above: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(value) in above:
        return
    if isinstance(value, (nn.ModuleList, nn.ModuleDict)):
        for key, child in value._modules.items():
            if child is not None:
                yield from _from_value(child, f"{name}.{key}", depth, above)
    elif isinstance(value, nn.Module):
        yield from _sides(name, value)
    elif depth < _MAX_DEPTH and isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            if isinstance(item, nn.Module):
                yield from _from_value(item, f"{name}.{index}", depth + 1, above)
    elif depth < _MAX_DEPTH and isinstance(value, dict) and not name.startswith("_"):
        for key, item in value.items():
            if isinstance(key, str) and isinstance(item, nn.Module):
                yield from _from_value(item, f"{name}.{key}", depth + 1, above)
    elif depth < _MAX_DEPTH and is_pipeline(value):
        yield from _inside(value, f"{name}.", set(), depth + 1, above | {id(value)})


def is_pipeline(value: Any) -> bool:
    """Return whether an object that a pipeline holds is a pipeline itself, as in diffusers' combined ones."""
    return isinstance(getattr(type(value), "components", None), property) and callable(value)


def _sides(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A module that encodes and decodes is called through its methods, so its two sides are parts."""
    sides = [side for side in ("decoder", "encoder") if isinstance(getattr(module, side, None), nn.Module)]
    if sides and hasattr(module, "decode"):
        for side in sides:
            yield f"{name}.{side}", getattr(module, side)
    else:
        yield name, module


def get_part(pipe: Pipeline, name: str) -> Any:
    """Return what lies at a dotted name, ``None`` if nothing does; steps are attributes, indices and keys."""
    value = pipe
    for step in name.split("."):
        value = _step(value, step)
    return value


def _step(value: Any, step: str) -> Any:
    if isinstance(value, (list, tuple)):
        return value[int(step)] if step.isdigit() and int(step) < len(value) else None
    if isinstance(value, dict):
        return value.get(step)
    return getattr(value, step, None)


def replace_part(pipe: Pipeline, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in every place of the pipeline where ``old`` is."""
    _replace(pipe, old, new, 0, {id(old), id(new)})


def _replace(owner: Any, old: nn.Module, new: nn.Module, depth: int, seen: set[int]) -> None:
    if id(owner) in seen or depth > _MAX_DEPTH + 1:
        return
    seen.add(id(owner))
    for name, value in members(owner):
        items = _items(value)
        found = [key for key, item in items if item is old]
        if value is old:
            setattr(owner, name, new)
        elif found and isinstance(value, tuple):
            setattr(owner, name, tuple(new if item is old else item for item in value))
        else:
            for key in found:
                value[key] = new
        for _, item in items or [(name, value)]:
            if isinstance(item, nn.Module):
                _replace_below(item, old, new, seen)
        if not isinstance(value, nn.Module) and is_pipeline(value):
            _replace(value, old, new, depth + 1, seen)


def _replace_below(module: nn.Module, old: nn.Module, new: nn.Module, seen: set[int]) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    for name, child in list(module._modules.items()):
        if child is old:
            setattr(module, name, new)
        elif child is not None:
            _replace_below(child, old, new, seen)


def _items(value: Any) -> list[tuple[Any, Any]]:
    """The items of a container, with the index or the key of each."""
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, (list, tuple)) else []


def attach(
    pipe: Pipeline, names: Sequence[str], options: PartOptions, *, blocks: Mapping[str, str] | None = None
) -> dict[str, PartState]:
    """Make frozen parts of ``names``, through onediffx and OneDiff; those that are frozen get the new options.

    ``blocks`` has the part of each name that is a block of one, and stands in no other place.
    """
    blocks = blocks or {}
    modules = {name: get_part(pipe, name) for name in names}
    compiled = compile_parts(modules, backend=BACKEND, options=options)
    states: dict[str, PartState] = {}
    for name, part in compiled.items():
        if part is not modules[name]:
            _put(pipe, name, modules[name], part, is_block=name in blocks)
        state = states[name] = part_state(part)
        state.name, state.part, state.regions = name, blocks.get(name, name), ""
    return states


def _put(pipe: Pipeline, name: str, old: nn.Module, new: nn.Module, *, is_block: bool) -> None:
    if is_block:  # a search of the whole pipeline for each of many blocks takes its time
        owner, _, key = name.rpartition(".")
        setattr(get_part(pipe, owner), key, new)
    else:
        replace_part(pipe, old, new)


def detach(pipe: Pipeline, names: Sequence[str]) -> None:
    """Give the pipeline its eager modules back."""
    for name in names:
        module = get_part(pipe, name)
        if isinstance(module, FrozenPart):
            state = part_state(module)
            _put(pipe, name, module, release(module), is_block=state.part != state.name)


def frozen_parts(pipe: Pipeline) -> dict[str, PartState]:
    """The states of the parts, and of the blocks in parts, that are frozen now, by name."""
    found = {}
    for name, module in find_parts(pipe).items():
        for path, child in {"": module}.items() if isinstance(module, FrozenPart) else module.named_modules():
            if isinstance(child, FrozenPart):
                found[f"{name}.{path}" if path else name] = part_state(child)
    return found


def by_part(states: Mapping[str, PartState]) -> dict[str, list[PartState]]:
    """Return the states by the part that each is, or is a block of."""
    grouped: dict[str, list[PartState]] = {}
    for state in states.values():
        grouped.setdefault(state.part, []).append(state)
    return grouped


def eager_reasons(members: Sequence[PartState]) -> list[str]:
    """Return why calls of a part, or of its blocks, ran eagerly since its states began to list."""
    refused = [slot.refusal for state in members for slot in state.touched.values() if slot.refusal]
    unstored = [why for state in members for why in state.unstored.values()]
    return list(dict.fromkeys([*refused, *unstored]))
