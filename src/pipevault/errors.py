"""Every error that pipevault raises.

One root, :class:`PipevaultError`; below it a class for each decision that a caller can take. Each class
also inherits the builtin that fits, carries what it is about as attributes, and says in its message what
happened, to what, and what to do next. The command line's exit codes and code words stand in ``cli/exits.py``.
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


class NoHomeError(SettingsError, RuntimeError):
    """This user has no home folder, and a folder in it is needed: set ``HOME``, or the variable that is named."""


class UnknownBackendError(SettingsError):
    """No backend of this name is registered."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(f"Unknown backend {name!r}. Backends: {', '.join(known)}.")
        self.name = name
        self.known = known


class UnusableBackendError(SettingsError):
    """A backend cannot run here: what it needs is missing, or of a version that it does not support.

    ``backend`` is its name.
    """

    def __init__(self, message: str, backend: str) -> None:
        super().__init__(message)
        self.backend = backend


class UnknownModeError(SettingsError):
    """The mode is none of ``compile``, ``require``, ``off``."""

    def __init__(self, mode: str, known: tuple[str, ...]) -> None:
        super().__init__(f"Unknown mode {mode!r}. Modes: {', '.join(known)}.")
        self.mode = mode
        self.known = known


class VaultError(PipevaultError):
    """The vault folder, or something in it, cannot be used. ``path`` says which."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


class NotAVaultError(VaultError, ValueError):
    """The folder holds files but no ``vault.json``: give another folder, or empty this one."""


class DamagedVaultError(VaultError, ValueError):
    """The ``vault.json`` of a folder is damaged: restore it, or give another folder."""


class NewerVaultError(VaultError):
    """A later pipevault wrote this vault: upgrade pipevault, or give another folder."""


class OldVaultError(VaultError):
    """An earlier pipevault wrote this vault, in a format that is no longer read: give another folder, or delete it."""


class VaultNotWritableError(VaultError, PermissionError):
    """The vault cannot be written: fix the permissions, or load in mode ``require``."""


class VaultFullError(VaultError, OSError):
    """No space was left while publishing: free space, or give another folder. The vault is unharmed."""


class UnsafeVaultError(VaultError, PermissionError):
    """Others may write where native code would be loaded from: fix the owner or the permissions."""


class SlowTierError(VaultError, TimeoutError):
    """A tier did not answer in time, so it is left out for a while: check its mount, or raise ``tier_timeout_s``."""


class UnloadableGraphError(VaultError):
    """The system refuses to map the code of a graph: see where its file system and the temporary folder are mounted."""


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


class TurnTimeoutError(PipevaultError, TimeoutError):
    """Other threads used the pipeline, or switches that exclude those of this call, for longer than it would wait."""

    def __init__(self, message: str, waited_s: float) -> None:
        super().__init__(message)
        self.waited_s = waited_s


class DeadlockError(PipevaultError, RuntimeError):
    """Two threads hold what the other one waits for: call pipelines inside one another in one order everywhere."""


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


class StatefulPartError(CannotFreezeError):
    """A part keeps state between its calls, so that they are frozen as the pipeline makes them, and not ahead."""


class NothingFrozenError(CannotFreezeError):
    """No part could be frozen, so there is nothing to publish."""


class CompilerMissingError(CannotFreezeError):
    """No working C++ compiler was found: install one, or load what another machine froze."""


class InterruptedBuildError(CannotFreezeError):
    """Compiling failed for a reason of the moment (compiler killed, disk or memory full): try again."""


class TemporaryFolderError(PipevaultError, OSError):
    """No temporary folder can be used to compile in. ``path`` is the first that was tried: set ``TMPDIR``."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


class TemporaryFolderFullError(TemporaryFolderError):
    """The temporary folder is full: free space there and try again, or set ``TMPDIR``."""


class NotFiniteError(CannotFreezeError):
    """The eager part returned NaN or infinity for this call, with which no graph can be compared."""


class WrongMachineError(PipevaultError, RuntimeError):
    """An artifact was built for another machine (GPU, instruction set): freeze on this one."""


class BadCallError(PipevaultError, ValueError):
    """The call that should be frozen is not one that the pipeline accepts (size, inputs)."""


class UnplacedArgumentError(BadCallError):
    """An argument cannot be divided among the samples of a batch: draw each sample in a call of its own.

    ``argument`` is its name.
    """

    def __init__(self, message: str, argument: str) -> None:
        super().__init__(message)
        self.argument = argument


class RecordError(PipevaultError, ValueError):
    """A run record cannot be used. ``source`` is the file it was read from; empty if it came from no file."""

    def __init__(self, message: str, source: str = "") -> None:
        super().__init__(message)
        self.source = source


class NoRecordError(RecordError, LookupError):
    """The file holds no run record: give the file as it was saved, or its sidecar."""


class NewerRecordError(RecordError):
    """A later pipevault wrote this record: upgrade pipevault."""


class OldRecordError(RecordError):
    """An earlier pipevault wrote this record, in a form that is no longer read: draw the output again."""


class RecordDigestError(RecordError):
    """The record was changed after it was written: use the file as it was saved."""


class BadRecordError(RecordError):
    """A field of a record is missing, unknown or of the wrong type; ``field`` says which: ``seeds.samples[1]``."""

    def __init__(self, message: str, field: str, source: str = "") -> None:
        super().__init__(message, source)
        self.field = field


class RecordTooLargeError(RecordError):
    """The record does not fit into a file of this format: save as PNG or WebP, or as a sidecar only."""


class UnknownFormatError(SettingsError):
    """No file of this suffix can be written with a record inside. ``known`` lists the suffixes that can."""

    def __init__(self, message: str, suffix: str, known: tuple[str, ...]) -> None:
        super().__init__(message)
        self.suffix = suffix
        self.known = known


class CannotSaveError(PipevaultError, OSError):
    """An output could not be written to ``path``: fix what the message names, or give another path."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


class MissingExtraError(PipevaultError, ImportError):
    """An optional dependency is not installed: install the extra that ``extra`` names."""

    def __init__(self, message: str, extra: str) -> None:
        super().__init__(message)
        self.extra = extra


class NotComparableError(PipevaultError, ValueError):
    """Two outputs have no distance: their shapes or types differ."""


class UnknownLevelError(SettingsError):
    """No determinism level or profile has this name. ``known`` lists those that can be asked for."""

    def __init__(self, level: str, known: tuple[str, ...]) -> None:
        super().__init__(f"Unknown level {level!r}. Levels: {', '.join(known)}, each also with +audit.")
        self.level = level
        self.known = known


class BadSeedError(SettingsError):
    """The value of ``seed`` cannot be used: pass an integer from 0 to 2**64 - 1."""

    def __init__(self, message: str, seed: Any) -> None:
        super().__init__(message)
        self.seed = seed


class GeneratorCountError(BadCallError):
    """The number of generators is not that of the samples: pass one for each sample, or a single one."""


class GeneratorDeviceError(BadCallError):
    """A generator is on a device that it cannot draw for: pass a CPU generator, which fits every device."""


class UnknownRecordKeyError(UnknownKeyError):
    """The vault does not hold the entry that a run record names: give the vault that made it, or freeze it again."""


class ChangedWeightsError(PipevaultError, ValueError):
    """The weights are not those of a record or a golden. ``parts`` names the parts: open the model as it was then."""

    def __init__(self, message: str, parts: tuple[str, ...]) -> None:
        super().__init__(message)
        self.parts = parts


class DifferentKeyError(PipevaultError, RuntimeError):
    """A pipeline has another key than a record: versions or settings differ. ``differences`` says which."""

    def __init__(self, message: str, differences: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.differences = differences


class OtherMachineError(PipevaultError, RuntimeError):
    """A record or a golden is of another machine type, whose bits cannot be promised here. ``differences`` says how."""

    def __init__(self, message: str, differences: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.differences = differences


class DifferentOutputError(PipevaultError, AssertionError):
    """An output is not what a golden expects. The message names the pictures that show it."""


class BadSuiteError(SettingsError):
    """A golden suite has a field that is missing, unknown or wrong; ``field`` says which."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class NoGoldenError(PipevaultError, LookupError):
    """Nothing was recorded for a case of a golden suite: record it first."""


class PinError(PipevaultError, ValueError):
    """A pin cannot be made or removed as asked: its name is taken, unknown or no name."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


class UnknownPinError(PinError, LookupError):
    """No pin has this name."""


class PinNameError(PinError):
    """The text is not a name that a pin can have."""


class EntryInUseError(PipevaultError, RuntimeError):
    """An entry that is pinned, or that a live process has loaded, was to be removed. ``key`` says which."""

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key


class BundleError(PipevaultError, ValueError):
    """A bundle is damaged, unsafe or no bundle: nothing of it was imported. ``path`` is the file."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


class NoBundleError(BundleError, LookupError):
    """No file is at ``path``: give the path of a bundle."""


class NewerBundleError(BundleError):
    """A later pipevault wrote this bundle: upgrade pipevault."""


class SignatureError(VaultError, PermissionError):
    """An entry has no signature, or none by a trusted key, where one is required: sign it, or trust its key."""


class KeyFileError(SettingsError):
    """A file or text is not an Ed25519 key of the kind that is needed, or a key file would be overwritten."""
