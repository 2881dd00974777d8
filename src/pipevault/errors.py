"""Every error that pipevault raises.

One root, :class:`PipevaultError`; below it a class for each decision that a caller can take. Each class
also inherits the builtin that fits, carries what it is about as attributes, and says in its message what
happened, to what, and what to do next. Exit codes of the command line live in ``cli/app.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


class PipevaultError(Exception):
    """Root of all errors of this package. All of them survive pickling, attributes included."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[PipevaultError], args: tuple[Any, ...], attributes: dict[str, Any]) -> PipevaultError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(attributes)
    return error


class SettingsError(PipevaultError, ValueError):
    """A setting, an argument or an environment variable has a value that cannot be used: correct it."""


class UnknownBackendError(SettingsError):
    """No backend of this name is registered."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(f"There is no backend {name!r}. Known backends: {', '.join(known)}.")
        self.name = name
        self.known = known


class UnknownModeError(SettingsError):
    """The mode is none of ``compile``, ``require``, ``off``."""

    def __init__(self, mode: str, known: tuple[str, ...]) -> None:
        super().__init__(f"There is no mode {mode!r}. Modes: {', '.join(known)}.")
        self.mode = mode
        self.known = known


class VaultError(PipevaultError):
    """The vault folder, or something in it, cannot be used. ``path`` says which."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


class NotAVaultError(VaultError, ValueError):
    """The folder holds files but no ``vault.json``: give another folder, or empty this one."""


class NewerVaultError(VaultError):
    """A later pipevault wrote this vault: upgrade pipevault, or give another folder."""


class VaultNotWritableError(VaultError, PermissionError):
    """The vault cannot be written: mend the permissions, or load in mode ``require``."""


class VaultFullError(VaultError, OSError):
    """No space was left while publishing: free space, or give another folder. The vault is unharmed."""


class UnsafeVaultError(VaultError, PermissionError):
    """Others may write where native code would be loaded from: mend owner or permissions."""


class CorruptEntryError(VaultError, ValueError):
    """An artifact or a manifest is not what was published: freeze the entry again."""


class UnknownKeyError(PipevaultError, LookupError):
    """No entry has this key, or more than one begins with it (``candidates``)."""

    def __init__(self, message: str, key: str, candidates: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.key = key
        self.candidates = candidates


class LockTimeoutError(PipevaultError, TimeoutError):
    """Another process held the lock of a key for longer than the caller would wait."""

    def __init__(self, message: str, key: str, waited_s: float) -> None:
        super().__init__(message)
        self.key = key
        self.waited_s = waited_s


class MissError(PipevaultError, LookupError):
    """Mode ``require``: the vault holds no usable entry. ``reason`` says why; freeze it first."""

    def __init__(self, message: str, key: str, reason: str) -> None:
        super().__init__(message)
        self.key = key
        self.reason = reason


class UnfrozenCallError(PipevaultError, LookupError):
    """A part was called with a signature that no frozen graph has."""

    def __init__(self, message: str, part: str, signature: str, frozen: tuple[str, ...]) -> None:
        super().__init__(message)
        self.part = part
        self.signature = signature
        self.frozen = frozen


class ChangedPartError(PipevaultError, RuntimeError):
    """A frozen part was changed in a way its graphs cannot follow: freeze the new state."""

    def __init__(self, message: str, part: str) -> None:
        super().__init__(message)
        self.part = part


class CannotFreezeError(PipevaultError, RuntimeError):
    """A pipeline or a part is in a state that must not be frozen. ``part`` is empty for the whole pipeline."""

    def __init__(self, message: str, part: str = "") -> None:
        super().__init__(message)
        self.part = part


class TrainingModeError(CannotFreezeError):
    """A part is in training mode, which would bake its dropout into the graph: call ``eval()`` first."""


class NothingFrozenError(CannotFreezeError):
    """No part could be frozen, so there is nothing to publish."""


class CompilerMissingError(CannotFreezeError):
    """No working C++ compiler was found: install one, or load what another machine froze."""


class WrongMachineError(PipevaultError, RuntimeError):
    """An artifact was built for another machine (GPU, instruction set): freeze on this one."""


class BadCallError(PipevaultError, ValueError):
    """The call that should be frozen is not one that the pipeline accepts (size, inputs)."""
