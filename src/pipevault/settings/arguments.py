"""The settings as keyword arguments: their names and types, written once for every function that takes them.

``from_pretrained`` and ``PipelineCache`` take a :class:`~pipevault.settings.Settings`, or its fields in place of one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from pipevault.errors import SettingsError
from pipevault.settings import Settings, Tier
from pipevault.settings.values import refuse_unknown

Function = TypeVar("Function", bound=Callable[..., Any])


class SettingsFields(TypedDict, total=False):
    """The fields of :class:`~pipevault.settings.Settings` but ``dir``; one left out, or ``None``, follows the settings.

    ``determinism`` is another name of ``level``.
    """

    mode: str | None
    backend: str | None
    weights: str | None
    on_unfrozen: str | None
    level: str | None
    determinism: str | None
    lock_timeout_s: float | None
    on_lock_timeout: str | None
    turn_timeout_s: float | None
    tiers: Sequence[str | Path | Tier | Mapping[str, Any]] | None
    tier_timeout_s: float | None
    max_size: int | str | None
    signature: str | None
    trusted_keys: Sequence[str | Path] | None
    trusted_users: Sequence[str | int] | None
    trusted_groups: Sequence[str | int] | None
    allow_group_write: bool | None
    shared: str | None
    regions: str | None
    jobs: int | None
    compile_profile: str | None


def field_names(group: type) -> tuple[str, ...]:
    return tuple(inspect.get_annotations(group))


def resolve_fields(settings: Settings | None, given: Mapping[str, Any]) -> Settings:
    """Return ``settings``, or those that are in force with the fields ``given``. :class:`SettingsError`: both at once,
    an unknown name, or a value that cannot be used.
    """
    known = ("dir", *field_names(SettingsFields))
    refuse_unknown("setting", given, known)
    fields = {name: value for name, value in given.items() if value is not None}
    if settings is not None:
        if fields:
            raise SettingsError(f"settings= and {', '.join(fields)}= are both given. Give settings or its fields.")
        return settings
    level, determinism = fields.get("level"), fields.pop("determinism", None)
    if determinism is not None:
        if level not in (None, determinism):
            raise SettingsError(
                f"level is {level!r} and determinism is {determinism!r}, two names of one setting. Give one of them."
            )
        fields["level"] = determinism
    return Settings.resolve(**fields)


def refuse_misspelt(given: Collection[str], known: Collection[str]) -> None:
    """Raise :class:`SettingsError` for a name in ``given`` that is nearly one of ``known``; others are let through."""
    for name in given:
        if name not in known and (near := get_close_matches(name, known, n=1, cutoff=0.8)):
            raise SettingsError(f"Unknown option {name}. Did you mean {near[0]}?")


def spelled_out(*groups: type) -> Callable[[Function], Function]:
    """Return a decorator that lists the names of ``groups`` in a function's signature, for ``help()`` and editors, in
    place of its ``**`` parameter, or before one of the type ``Any``.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        *named, rest = signature.parameters.values()
        for group in groups:
            for name, kind in inspect.get_annotations(group).items():
                text = getattr(kind, "__forward_arg__", kind)
                named.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=text))
        last = [rest] if rest.annotation == "Any" else []
        function.__signature__ = signature.replace(parameters=[*named, *last])  # type: ignore[attr-defined]
        return function

    return decorate
