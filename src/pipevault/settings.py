"""Settings: one frozen dataclass, resolved once.

Precedence, first match wins:

1. an argument,
2. an environment variable ``PIPEVAULT_<NAME>`` (``PIPEVAULT_DIR``, ``PIPEVAULT_MODE``, …),
3. the config file: ``PIPEVAULT_CONFIG`` if set, else ``pipevault/config.toml`` in the user's config folder,
   a flat TOML table with the names of the fields below,
4. the default.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pipevault.errors import SettingsError, UnknownBackendError, UnknownModeError

MODES = ("compile", "require", "off")
WEIGHTS_POLICIES = ("bound", "baked")
BACKENDS = ("inductor",)
UNFROZEN_POLICIES = ("error", "eager")
ENVIRONMENT_PREFIX = "PIPEVAULT_"


@dataclass(frozen=True)
class Settings:
    """What a :class:`pipevault.PipelineCache` works with.

    ``dir``: the vault's folder. ``mode``: ``compile`` (a miss compiles and publishes), ``require`` (a miss is an
    error), ``off`` (pipelines are left alone). ``weights``: ``bound`` (a graph takes the live weights) or ``baked``
    (weights are compiled in and are part of the key). ``on_unfrozen``: what a call does that fits no frozen graph,
    ``error`` or ``eager``. ``lock_timeout_s``: how long to wait for another process that compiles the same key.
    """

    dir: Path
    mode: str = "compile"
    backend: str = "inductor"
    weights: str = "bound"
    on_unfrozen: str = "error"
    lock_timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UnknownModeError(self.mode, MODES)
        if self.backend not in BACKENDS:
            raise UnknownBackendError(self.backend, BACKENDS)
        _one_of("weights", self.weights, WEIGHTS_POLICIES)
        _one_of("on_unfrozen", self.on_unfrozen, UNFROZEN_POLICIES)
        if not self.lock_timeout_s >= 0:
            raise SettingsError(f"lock_timeout_s must be 0 or more seconds, not {self.lock_timeout_s!r}.")

    @classmethod
    def resolve(cls, *, environ: Mapping[str, str] | None = None, **arguments: Any) -> Settings:
        """The settings in force; an argument of ``None`` counts as not given.

        Raises :class:`SettingsError` for an unknown name or a value of the wrong kind, wherever it was set.
        """
        environ = os.environ if environ is None else environ
        names = tuple(field.name for field in fields(cls))
        if unknown := set(arguments) - set(names):
            raise SettingsError(f"Unknown settings: {', '.join(sorted(unknown))}. Settings: {', '.join(names)}.")
        in_file = _read_config_file(environ, names)
        values: dict[str, Any] = {"dir": default_dir()}
        for name in names:
            variable = ENVIRONMENT_PREFIX + name.upper()
            if arguments.get(name) is not None:
                values[name] = _convert(name, arguments[name], source="argument")
            elif environ.get(variable):
                values[name] = _convert(name, environ[variable], source=f"environment variable {variable}")
            elif name in in_file:
                values[name] = _convert(name, in_file[name], source="config file")
        return cls(**values)


def default_dir() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("pipevault", appauthor=False) / "vault"


def config_file(environ: Mapping[str, str] | None = None) -> Path:
    """Where the config file is looked for; it need not exist."""
    environ = os.environ if environ is None else environ
    if path := environ.get(ENVIRONMENT_PREFIX + "CONFIG"):
        return Path(path).expanduser()
    from platformdirs import user_config_path

    return user_config_path("pipevault", appauthor=False) / "config.toml"


def _read_config_file(environ: Mapping[str, str], names: tuple[str, ...]) -> dict[str, Any]:
    path = config_file(environ)
    try:
        values = _parse_toml(path.read_text("utf-8"))
    except FileNotFoundError:
        if environ.get(ENVIRONMENT_PREFIX + "CONFIG"):
            raise SettingsError(
                f"PIPEVAULT_CONFIG names {path}, which does not exist. Create it or unset the variable."
            ) from None
        return {}
    except (OSError, ValueError) as error:
        raise SettingsError(f"The config file {path} cannot be read: {error}. Correct or remove it.") from error
    if unknown := set(values) - set(names):
        raise SettingsError(
            f"The config file {path} has unknown settings: {', '.join(sorted(unknown))}. Settings: {', '.join(names)}."
        )
    return values


def _parse_toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def _convert(name: str, value: Any, *, source: str) -> Any:
    try:
        if name == "dir":
            return Path(value).expanduser().absolute()
        if name == "lock_timeout_s":
            return float(value)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{name} from the {source} cannot be used: {value!r} ({error}).") from error
    if not isinstance(value, str):
        raise SettingsError(f"{name} from the {source} must be text, not {value!r}.")
    return value


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SettingsError(f"{name} must be one of {', '.join(allowed)}, not {value!r}.")
