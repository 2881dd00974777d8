"""Settings: one frozen dataclass, resolved once.

Precedence, first match wins:

1. an argument,
2. an environment variable ``PIPEVAULT_<NAME>`` (``PIPEVAULT_DIR``, ``PIPEVAULT_MODE``, …),
3. the config file: ``PIPEVAULT_CONFIG`` if set, else ``pipevault/config.toml`` in the user's config folder,
   a TOML table with the names of the fields below; a relative folder starts at the file's own,
4. the default.

Unknown names are errors, in the environment and in the file alike: a misspelt one would be ignored.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pipevault.errors import (
    NoHomeError,
    SettingsError,
    UnknownBackendError,
    UnknownLevelError,
    UnknownModeError,
    UnsafeVaultError,
)
from pipevault.reading import read_open
from pipevault.settings.ownership import open_owned
from pipevault.settings.user_folders import expand_user, user_folder
from pipevault.settings.values import Tier, convert, invalid, refuse_unknown

__all__ = ["LEVELS", "PROFILES", "Settings", "Tier", "config_file", "default_dir", "split_level"]

MODES = ("compile", "require", "off")
BACKENDS = ("inductor", "nexfort", "oneflow")
LEVELS = ("off", "seeded", "repeatable", "strict", "invariant")
PROFILES: Mapping[str, str] = {"development": "seeded", "test": "strict", "production": "repeatable"}
"""Names for levels by what a program is for.

``development``: the same noise, nothing else is held. ``test``: an operation that has no deterministic form raises, and
a graph that is compiled again gives the same bits. ``production``: the same bits for the same entry.
"""
ENVIRONMENT_PREFIX = "PIPEVAULT_"
CONFIG_VARIABLE = "PIPEVAULT_CONFIG"
DEBUG_VARIABLE = "PIPEVAULT_DEBUG"
_CONFIG_LIMIT_BYTES = 1 << 20

# Kubernetes puts the services of a namespace into every container's environment; one of them may be called pipevault.
# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
_SERVICE_VARIABLE = re.compile(r"PIPEVAULT_(\w+_)?(SERVICE_(HOST|PORT)|PORT_\d+_(TCP|UDP|SCTP))(_\w+)?|PIPEVAULT_PORT")
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "weights": ("bound", "baked"),
    "on_unfrozen": ("compile", "eager", "background", "error"),
    "on_lock_timeout": ("error", "compile"),
    "signature": ("off", "warn", "require"),
    "shared": ("no", "group"),
    "regions": ("auto", "blocks", "off"),
    "compile_profile": ("fast", "balanced", "max"),
}
"""The values of each setting that is one of a few words; ``on_unfrozen`` may be ``None`` too."""


@dataclass(frozen=True)
class Settings:
    """The settings of a :class:`pipevault.PipelineCache`.

    ``dir``: the vault's folder. ``backend``: what compiles, ``inductor`` or one of OneDiff's own, ``nexfort`` or
    ``oneflow``. ``mode``: ``compile`` (a miss compiles and publishes), ``require`` (a miss is an
    error), ``off`` (pipelines are left alone). ``weights``: ``bound`` (a graph takes the live weights) or ``baked``
    (weights are compiled in and are part of the key). ``on_unfrozen``: what a call does that has no graph:
    ``compile`` (it is frozen on the spot), ``eager``, ``background`` (eager now, frozen by another process for later
    calls) or ``error``; see :attr:`unfrozen_policy` for the default. ``level``: how much is done for the same bits, one
    of :data:`LEVELS` or :data:`PROFILES`, with ``+audit`` to hash the latents of each step. ``lock_timeout_s``: how
    long to wait for another process that compiles the same key. ``on_lock_timeout``: what happens then, ``error`` or
    ``compile`` (of its own). ``turn_timeout_s``: how long a call waits for its turn among those of other threads.

    ``tiers``: the vaults that are searched, in order; ``dir`` is searched first unless it is one of them, and is where
    new entries are published. ``tier_timeout_s``: how long a tier other than ``dir`` may take to answer.
    ``max_size``: bytes that the vault may hold (as text also ``20GB``, ``500MiB``); no limit is ``None`` here, and the
    text ``none`` wherever it is resolved from.
    ``signature``: what is asked of an entry before its code is loaded: ``off``, ``warn`` or ``require`` a signature by
    one of ``trusted_keys``, public keys as text or files that hold one. ``trusted_users``, ``trusted_groups``: names or
    numbers of users and groups whose files are trusted like this user's own. ``allow_group_write``: whether files that
    their group may write are trusted, whatever group that is. ``shared``: ``group`` for a vault in which the members of
    its folder's group work together, and trust one another. ``regions``: ``blocks`` freezes the repeated blocks of a
    part that has any, one graph for each kind of block; ``off`` freezes each part whole; ``auto`` decides by their
    number and size. ``jobs``: how many graphs are compiled at a time, each by a process; 0 stands for as many as there
    are cores. ``compile_profile``: ``fast`` spends less time on compiling than ``balanced``, ``max`` more, to try
    kernels and keep the best.
    """

    dir: Path
    mode: str = "compile"
    backend: str = "inductor"
    weights: str = "bound"
    on_unfrozen: str | None = None
    level: str = "repeatable"
    lock_timeout_s: float = 3600.0
    on_lock_timeout: str = "error"
    turn_timeout_s: float = 3600.0
    tiers: tuple[Tier, ...] = ()
    tier_timeout_s: float = 5.0
    max_size: int | None = 50_000_000_000
    signature: str = "off"
    trusted_keys: tuple[str, ...] = ()
    trusted_users: tuple[str, ...] = ()
    trusted_groups: tuple[str, ...] = ()
    allow_group_write: bool = False
    shared: str = "no"
    regions: str = "auto"
    jobs: int = 0
    compile_profile: str = "balanced"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UnknownModeError(self.mode, MODES)
        if self.backend not in BACKENDS:
            raise UnknownBackendError(self.backend, BACKENDS)
        split_level(self.level)
        for name, allowed in _CHOICES.items():
            if name != "on_unfrozen" or self.on_unfrozen is not None:
                _check_choice(name, getattr(self, name), allowed)
        if self.mode == "require" and self.on_unfrozen in ("compile", "background"):
            raise SettingsError(
                f"on_unfrozen {self.on_unfrozen!r} compiles, and mode 'require' never does. Use on_unfrozen "
                "'eager' or 'error', or mode 'compile'."
            )
        if self.backend != "inductor" and self.compile_profile != "balanced":
            raise SettingsError(
                f"compile_profile {self.compile_profile!r} is one of backend 'inductor'. Give {self.backend} its own "
                "options in build_config."
            )
        if self.jobs < 0:
            raise invalid("jobs", self.jobs, "0 (as many as there are cores) or more")
        for tier in self.tiers:
            _check_choice(f"signature of the tier {tier.dir}", tier.signature or "off", _CHOICES["signature"])
        for name in ("lock_timeout_s", "turn_timeout_s", "tier_timeout_s"):
            if not getattr(self, name) >= 0:
                raise invalid(name, getattr(self, name), "0 or more seconds")
        if self.max_size is not None and self.max_size <= 0:
            raise invalid(
                "max_size", self.max_size, "1 or more bytes, or none (`pipevault prune --max-size 0` empties a vault)"
            )

    @property
    def unfrozen_policy(self) -> str:
        """The policy for a call that has no graph: ``on_unfrozen``, else ``compile`` or ``error`` as the mode is."""
        return self.on_unfrozen or ("compile" if self.mode == "compile" else "error")

    @property
    def build_processes(self) -> int:
        return self.jobs or len(os.sched_getaffinity(0))

    @property
    def is_shared(self) -> bool:
        return self.shared == "group"

    def to_json(self) -> dict[str, Any]:
        tiers = [{**asdict(tier), "dir": str(tier.dir)} for tier in self.tiers]
        lists = {name: list(getattr(self, name)) for name in ("trusted_keys", "trusted_users", "trusted_groups")}
        return {**asdict(self), "dir": str(self.dir), "tiers": tiers, **lists}

    @classmethod
    def resolve(cls, *, environ: Mapping[str, str] | None = None, **arguments: Any) -> Settings:
        """Return the settings in force; an argument of ``None`` counts as not given. :class:`SettingsError`: an unknown
        name or a value of the wrong kind, wherever it was set.
        """
        environ = os.environ if environ is None else environ
        names = tuple(field.name for field in fields(cls))
        refuse_unknown("setting", arguments, names)
        _refuse_unknown_variables(environ, names)
        file = config_file(environ)
        in_file = _read_config_file(file, environ, names) if file is not None else {}
        values: dict[str, Any] = {}
        kinds: dict[str, str] = {}
        for name in names:
            variable = ENVIRONMENT_PREFIX + name.upper()
            if (given := arguments.get(name)) is not None:
                kind, source, base = "an argument", f"the argument {name}", Path()
            elif given := environ.get(variable):
                kind, source, base = "the environment", f"the environment variable {variable}", Path()
            elif file is not None and name in in_file:
                given, kind, source, base = in_file[name], "the config file", f"the config file {file}", file.parent
            else:
                continue
            try:
                value = convert(name, given, base=base)
                cls(**{"dir": Path(), name: value})
            except SettingsError as error:
                error.args = (f"{error} It was set by {source}.",)
                raise
            values[name], kinds[name] = value, kind
        if "dir" not in values:
            values["dir"] = default_dir()
        settings = cls(**values)
        _refuse_weaker_tiers(settings, kinds)
        return settings


def split_level(text: str) -> tuple[str, bool]:
    """Return the level that ``text`` names and whether it asks for ``+audit``. :class:`UnknownLevelError`."""
    name, plus, modifier = text.partition("+")
    name = PROFILES.get(name, name)
    if name not in LEVELS or modifier != ("audit" if plus else ""):
        raise UnknownLevelError(text, (*LEVELS, *PROFILES))
    return name, bool(plus)


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise invalid(name, value, f"one of {', '.join(allowed)}")


def default_dir() -> Path:
    """Return where the vault lies if nothing says otherwise. :class:`NoHomeError`: this user has no home."""
    return user_folder("cache") / "vault"


def config_file(environ: Mapping[str, str] | None = None) -> Path | None:
    """Return where the config file is looked for; it need not exist. ``None``: nowhere, for this user has no home."""
    environ = os.environ if environ is None else environ
    if path := environ.get(CONFIG_VARIABLE):
        return expand_user(path)
    try:
        return user_folder("config") / "config.toml"
    except NoHomeError:
        return None


def _refuse_unknown_variables(environ: Mapping[str, str], names: tuple[str, ...]) -> None:
    given = [name for name, value in environ.items() if value and name.startswith(ENVIRONMENT_PREFIX)]
    asked = [name.removeprefix(ENVIRONMENT_PREFIX) for name in given if not _SERVICE_VARIABLE.fullmatch(name)]
    refuse_unknown("setting", asked, [*map(str.upper, names), "CONFIG", "DEBUG"], prefix=ENVIRONMENT_PREFIX)


def _read_config_file(path: Path, environ: Mapping[str, str], names: tuple[str, ...]) -> dict[str, Any]:
    try:
        data = read_open(open_owned(path), path, limit_bytes=_CONFIG_LIMIT_BYTES)
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
        values: dict[str, Any] = tomllib.loads(data.decode("utf-8"))
    except UnsafeVaultError as error:  # an OSError too
        raise SettingsError(
            f"The config file {path} is not read, for it decides which code is loaded: {error}"
        ) from error
    except FileNotFoundError:
        if environ.get(CONFIG_VARIABLE):
            raise SettingsError(
                f"{CONFIG_VARIABLE} names {path}, which does not exist. Create it or unset the variable."
            ) from None
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"The config file {path} cannot be read: {error}. Correct or remove it.") from error
    refuse_unknown("setting", values, names, f" in the config file {path}")
    return values


def _refuse_weaker_tiers(settings: Settings, kinds: Mapping[str, str]) -> None:
    """A tier may ask for less than ``require`` only where both are said in one place, so that it is meant."""
    weaker = [tier for tier in settings.tiers if tier.signature in ("off", "warn")]
    if settings.signature == "require" and weaker and kinds["tiers"] != kinds["signature"]:
        raise SettingsError(
            f"signature is 'require', set by {kinds['signature']}, and {kinds['tiers']} weakens it to "
            f"{weaker[0].signature!r} for the tier {weaker[0].dir}. Say both in one place, or leave the tier's out."
        )
