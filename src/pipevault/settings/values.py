"""Values of settings: what is given in arguments, environment variables and the config file, made what it means."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pipevault.errors import NoHomeError, SettingsError
from pipevault.settings.ownership import id_of
from pipevault.settings.user_folders import expand_user

_UNITS: Mapping[str, int] = {
    "": 1,
    "b": 1,
    **{unit: 1000**power for power, unit in enumerate(("kb", "mb", "gb", "tb"), start=1)},
    **{unit: 1024**power for power, unit in enumerate(("kib", "mib", "gib", "tib"), start=1)},
}
_AMOUNT = re.compile(r"(-?\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)
_LONGEST_AMOUNT = 32
_TRUTHS: Mapping[str, bool] = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


@dataclass(frozen=True)
class Tier:
    """One of several vaults that are searched in order. ``signature`` overrides the setting of that name here.
    ``copy``: whether a hit is copied to the nearest vault before it that can be written.
    """

    dir: Path
    signature: str | None = None
    copy: bool = True


def convert(name: str, value: Any, *, base: Path) -> Any:
    """Return ``value`` as the type of a setting; relative folders start at ``base``. :class:`SettingsError`."""
    if converter := _CONVERTERS.get(name):
        return converter(name, value, base)
    if not isinstance(value, str):
        raise invalid(name, value, "text")
    return value


def invalid(name: str, value: Any, expected: str) -> SettingsError:
    return SettingsError(f"Invalid {name} {value!r}: expected {expected}.")


def refuse_unknown(kind: str, given: Iterable[str], known: Sequence[str], where: str = "", prefix: str = "") -> None:
    """Raise :class:`SettingsError` for a name in ``given`` that is not ``known``, with the nearest that is; ``prefix``
    stands before each name in the message.
    """
    for name in sorted(set(given) - set(known)):
        near = get_close_matches(name, known, n=1)
        advice = f"Did you mean {prefix}{near[0]}?" if near else f"Known: {', '.join(map(prefix.__add__, known))}."
        raise SettingsError(f"Unknown {kind} {prefix}{name}{where}. {advice}")


def parse_amount(text: str, units: Mapping[str, float]) -> float | None:
    """Return ``1.5 GiB`` times what ``units`` has for ``gib``; ``None`` for other text. It may be negative."""
    match = _AMOUNT.fullmatch(text.strip()) if len(text) <= _LONGEST_AMOUNT else None
    unit = units.get(match[2].lower()) if match else None
    if match is None or unit is None:
        return None
    return unit * (float(match[1]) if "." in match[1] else int(match[1]))


def parse_limit(name: str, value: Any) -> int | None:
    """Return the bytes of ``20GB``, ``1.5 GiB`` or a plain number; ``None`` for ``none``. :class:`SettingsError`."""
    if value is None or (isinstance(value, str) and value.strip().lower() == "none"):
        return None
    is_number = isinstance(value, int) and not isinstance(value, bool)
    amount = value if is_number else parse_amount(value, _UNITS) if isinstance(value, str) else None
    if amount is None:
        raise invalid(name, value, "a number of bytes, for example 20GB or 500MiB")
    if (size_bytes := int(amount)) < 0:
        raise invalid(name, value, "0 or more bytes, or none")
    return size_bytes


def _folder(name: str, value: Any, base: Path) -> Path:
    if not isinstance(value, (str, os.PathLike)) or not str(value) or "\0" in str(value):
        raise invalid(name, value, "a folder")
    try:
        return (base / expand_user(value)).absolute()
    except NoHomeError as error:
        raise SettingsError(f"Invalid {name} {str(value)!r}: {error}") from error


def _seconds(name: str, value: Any, base: Path) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError(value)
        return float(value)
    except (TypeError, ValueError) as error:
        raise invalid(name, value, "a number of seconds") from error


def _count(name: str, value: Any, base: Path) -> int:
    try:
        if isinstance(value, bool) or int(value) != float(value):
            raise ValueError(value)
        return int(value)
    except (TypeError, ValueError) as error:
        raise invalid(name, value, "a whole number") from error


def _truth(name: str, value: Any, base: Path) -> bool:
    known = value if isinstance(value, bool) else _TRUTHS.get(str(value).lower())
    if known is None:
        raise invalid(name, value, "true or false")
    return known


def _listed(name: str, value: Any) -> Sequence[Any]:
    """The environment separates with the system's path separator; elsewhere a list is given."""
    if isinstance(value, str):
        return [item for item in value.split(os.pathsep) if item]
    if not isinstance(value, (list, tuple)):
        raise invalid(name, value, "a list")
    return value


def _tiers(name: str, value: Any, base: Path) -> tuple[Tier, ...]:
    tiers = tuple(_tier(name, item, base) for item in _listed(name, value))
    folders = [tier.dir for tier in tiers]
    if repeated := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise SettingsError(f"{name} names {repeated} twice. Name each folder once.")
    return tiers


def _tier(name: str, item: Any, base: Path) -> Tier:
    if isinstance(item, Tier):
        return item
    if not isinstance(item, Mapping):
        return Tier(_folder(name, item, base))
    if "dir" not in item or set(item) - {"dir", "signature", "copy"}:
        raise invalid("tier", dict(item), "dir, and perhaps signature and copy")
    signature = item.get("signature")
    if signature is not None and not isinstance(signature, str):
        raise invalid("signature of a tier", signature, "text")
    return Tier(_folder(name, item["dir"], base), signature, _truth("copy of a tier", item.get("copy", True), base))


def _keys(name: str, value: Any, base: Path) -> tuple[str, ...]:
    keys = tuple(_listed(name, value))
    for key in keys:
        if not isinstance(key, (str, os.PathLike)) or not str(key) or "\0" in str(key):
            raise invalid(name, key, "public keys as text, or files that hold one")
    return tuple(str(key) for key in keys)


def _names(name: str, value: Any, base: Path) -> tuple[str, ...]:
    names = tuple(_listed(name, value))
    for item in names:
        if isinstance(item, bool) or not isinstance(item, (str, int)) or not str(item) or str(item).startswith("-"):
            raise invalid(name, item, "names or numbers")
        id_of(str(item), name)
    return tuple(str(item) for item in names)


_CONVERTERS: Mapping[str, Callable[[str, Any, Path], Any]] = {
    "dir": _folder,
    "lock_timeout_s": _seconds,
    "jobs": _count,
    "turn_timeout_s": _seconds,
    "tier_timeout_s": _seconds,
    "max_size": lambda name, value, base: parse_limit(name, value),
    "tiers": _tiers,
    "trusted_keys": _keys,
    "trusted_users": _names,
    "trusted_groups": _names,
    "allow_group_write": _truth,
}
