"""Two snapshots of a module, compared in words for error messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

_SHOWN_LENGTH = 60


def describe_difference(before: Mapping[str, str], after: Mapping[str, str], *, limit: int = 3) -> str:
    """Return the first ``limit`` changes between two snapshots in words. Snapshots map ``path`` to a class and
    ``path:name`` to a value. Another class is one change, whatever it holds.
    """
    changes = list(_changes(before, after))
    text = "; ".join(changes[:limit])
    return f"{text}; and {len(changes) - limit} more" if len(changes) > limit else text


def changed_names(before: Mapping[str, str], after: Mapping[str, str]) -> set[str]:
    """Return the names, ``path`` or ``path:name``, under which two snapshots differ."""
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[str]:
    names = [*after, *(name for name in before if name not in after)]
    replaced = {name for name in names if ":" not in name and before.get(name) != after.get(name)}
    for name in names:
        old, new = before.get(name), after.get(name)
        path, colon, attribute = name.partition(":")
        if old == new or (path in replaced and colon) or (path and path.rpartition(".")[0] in replaced):
            continue
        where = path or "the part itself"
        yield f"{where}: {attribute} {_value_change(old, new)}" if colon else f"{where}: {_class_change(old, new)}"


def _clip(text: str, other: str = "") -> str:
    """A long value, cut down to the place where it begins to differ."""
    if len(text) <= _SHOWN_LENGTH:
        return text
    differing = (place for place, pair in enumerate(zip(text, other, strict=False)) if pair[0] != pair[1])
    same = next(differing, min(len(text), len(other)))
    comma = text.rfind(", ", 0, same)
    start = 0 if comma < 0 else comma + 2
    stop = start + _SHOWN_LENGTH
    return f"{'…' if start else ''}{text[start:stop]}{'…' if stop < len(text) else ''}"


def _value_change(old: str | None, new: str | None) -> str:
    if old is None:
        return f"is new: {_clip(new or '')}"
    if new is None:
        return f"is gone, it was {_clip(old)}"
    return f"changed from {_clip(old, new)} to {_clip(new, old)}"


def _class_change(old: str | None, new: str | None) -> str:
    if old is None:
        return f"{new} is new"
    if new is None:
        return f"{old} is gone"
    if old.partition(" code:")[0] == new.partition(" code:")[0] and " code:" in old and " code:" in new:
        return f"the code of {_short(old)}, or a value that it reads, changed"
    return f"{old} became {new}" if _short(old) == _short(new) else f"{_short(old)} became {_short(new)}"


def _short(identity: str) -> str:
    return identity.partition(" ")[0].rpartition(".")[2]
