"""Entries chosen by the factors of their keys: the toolchain, model, machine or dtype that they are for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pipevault.digest import Digest
from pipevault.errors import SettingsError
from pipevault.store.manifest import Manifest

Matched = dict[Digest, str]
Values = Callable[[Manifest], set[str]]


def matching(manifests: Iterable[Manifest], wanted: Mapping[str, str], is_old: Callable[[Manifest], bool]) -> Matched:
    """Return the keys of the entries that have every value of ``wanted`` (``model``, ``machine``, ``dtype``; case does
    not matter) and, where it has ``toolchain``, are old; each with the reason. :class:`SettingsError`: no entry has
    one.
    """
    entries = list(manifests)
    known = {name: {text for entry in entries for text in _VALUES[name](entry)} for name in wanted if name in _VALUES}
    for name, values in known.items():
        if wanted[name].lower() not in {value.lower() for value in values}:
            has = f"They have {', '.join(sorted(values))}." if values else "They have none."
            raise SettingsError(f"No entry has the {name} {wanted[name]!r}. {has}")
    reason = ", ".join(f"{name} {value}" for name, value in wanted.items())
    return {
        entry.key.digest: reason
        for entry in entries
        if ("toolchain" not in wanted or is_old(entry))
        and all(wanted[name].lower() in {value.lower() for value in _VALUES[name](entry)} for name in known)
    }


def _models(entry: Manifest) -> set[str]:
    groups = (entry.key.factors.get(name) for name in ("pipeline", "architecture"))
    classes = {name for group in groups if isinstance(group, Mapping) for name in _texts(group.get("class"))}
    return classes | {name.rpartition(".")[2] for name in classes}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, str):
        yield value


_VALUES: Mapping[str, Values] = {
    "model": _models,
    "machine": lambda entry: set(_texts(entry.key.factors.get("machine"))),
    "dtype": lambda entry: set(_texts(entry.key.factors.get("dtype"))),
}
