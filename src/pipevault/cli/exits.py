"""Exit codes, and the word for each kind of error: one table for the whole command line."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from enum import IntEnum
from typing import Any

from pipevault import errors
from pipevault.cli import render
from pipevault.errors import CannotSaveError, PipevaultError
from pipevault.settings import DEBUG_VARIABLE


class Exit(IntEnum):
    """The exit codes; :data:`MEANINGS` says what each one means."""

    DONE = 0
    NO = 1
    USAGE = 2
    REFUSED = 3
    NOT_NOW = 4
    INTERRUPTED = 130


MEANINGS: Mapping[Exit, str] = {
    Exit.DONE: "done",
    Exit.NO: "not equal or not found; doctor: a check failed",
    Exit.USAGE: "wrong usage: an option, a setting or a call cannot be used",
    Exit.REFUSED: "damaged or refused",
    Exit.NOT_NOW: "not possible now, or not on this machine",
    Exit.INTERRUPTED: "interrupted",
}

KINDS: Mapping[type[PipevaultError], tuple[Exit, str]] = {
    PipevaultError: (Exit.NOT_NOW, "failed"),
    # Not equal or not found
    errors.MissError: (Exit.NO, "miss"),
    errors.UnfrozenCallError: (Exit.NO, "unfrozen-call"),
    errors.NotAVaultError: (Exit.NO, "not-a-vault"),
    errors.UnknownKeyError: (Exit.NO, "unknown-key"),
    errors.UnknownRecordKeyError: (Exit.NO, "unknown-record-key"),
    errors.UnknownPinError: (Exit.NO, "unknown-pin"),
    errors.NoBundleError: (Exit.NO, "not-found"),
    errors.NoRecordError: (Exit.NO, "no-record"),
    errors.NoGoldenError: (Exit.NO, "no-golden"),
    errors.DifferentOutputError: (Exit.NO, "different-output"),
    errors.DifferentKeyError: (Exit.NO, "different-key"),
    errors.ChangedWeightsError: (Exit.NO, "changed-weights"),
    errors.NotComparableError: (Exit.NO, "not-comparable"),
    # Wrong usage
    errors.SettingsError: (Exit.USAGE, "bad-setting"),
    errors.NoHomeError: (Exit.USAGE, "no-home"),
    errors.UnknownBackendError: (Exit.USAGE, "unknown-backend"),
    errors.UnknownModeError: (Exit.USAGE, "unknown-mode"),
    errors.UnknownLevelError: (Exit.USAGE, "unknown-level"),
    errors.UnknownFormatError: (Exit.USAGE, "unknown-format"),
    errors.PinNameError: (Exit.USAGE, "bad-pin-name"),
    errors.BadSeedError: (Exit.USAGE, "bad-seed"),
    errors.BadSuiteError: (Exit.USAGE, "bad-suite"),
    errors.KeyFileError: (Exit.USAGE, "bad-key-file"),
    errors.BadCallError: (Exit.USAGE, "bad-call"),
    errors.UnplacedArgumentError: (Exit.USAGE, "unplaced-argument"),
    errors.GeneratorCountError: (Exit.USAGE, "generator-count"),
    errors.GeneratorDeviceError: (Exit.USAGE, "generator-device"),
    errors.RecordTooLargeError: (Exit.USAGE, "record-too-large"),
    # Damaged or refused
    errors.VaultError: (Exit.REFUSED, "bad-vault"),
    errors.DamagedVaultError: (Exit.REFUSED, "damaged-vault"),
    errors.NewerVaultError: (Exit.REFUSED, "newer-vault"),
    errors.OldVaultError: (Exit.REFUSED, "old-vault"),
    errors.UnsafeVaultError: (Exit.REFUSED, "unsafe-vault"),
    errors.SignatureError: (Exit.REFUSED, "bad-signature"),
    errors.CorruptEntryError: (Exit.REFUSED, "corrupt-entry"),
    errors.BundleError: (Exit.REFUSED, "bad-bundle"),
    errors.NewerBundleError: (Exit.REFUSED, "newer-bundle"),
    errors.RecordError: (Exit.REFUSED, "bad-record"),
    errors.BadRecordError: (Exit.REFUSED, "bad-record-field"),
    errors.NewerRecordError: (Exit.REFUSED, "newer-record"),
    errors.OldRecordError: (Exit.REFUSED, "old-record"),
    errors.RecordDigestError: (Exit.REFUSED, "changed-record"),
    errors.PinError: (Exit.REFUSED, "bad-pin"),
    errors.EntryInUseError: (Exit.REFUSED, "entry-in-use"),
    errors.CannotFreezeError: (Exit.REFUSED, "cannot-freeze"),
    errors.StatefulPartError: (Exit.REFUSED, "stateful-part"),
    errors.TrainingModeError: (Exit.REFUSED, "training-mode"),
    errors.NothingFrozenError: (Exit.REFUSED, "nothing-frozen"),
    errors.NotFiniteError: (Exit.REFUSED, "not-finite"),
    errors.ChangedPartError: (Exit.REFUSED, "changed-part"),
    # Not possible now
    errors.UnusableBackendError: (Exit.NOT_NOW, "unusable-backend"),
    errors.VaultNotWritableError: (Exit.NOT_NOW, "vault-not-writable"),
    errors.VaultFullError: (Exit.NOT_NOW, "vault-full"),
    errors.SlowTierError: (Exit.NOT_NOW, "slow-tier"),
    errors.UnloadableGraphError: (Exit.NOT_NOW, "unloadable-graph"),
    errors.LockTimeoutError: (Exit.NOT_NOW, "lock-timeout"),
    errors.TurnTimeoutError: (Exit.NOT_NOW, "turn-timeout"),
    errors.DeadlockError: (Exit.NOT_NOW, "deadlock"),
    errors.CompilerMissingError: (Exit.NOT_NOW, "compiler-missing"),
    errors.InterruptedBuildError: (Exit.NOT_NOW, "interrupted-build"),
    errors.TemporaryFolderError: (Exit.NOT_NOW, "no-temporary-folder"),
    errors.TemporaryFolderFullError: (Exit.NOT_NOW, "temporary-folder-full"),
    errors.CannotSaveError: (Exit.NOT_NOW, "cannot-save"),
    errors.MissingExtraError: (Exit.NOT_NOW, "missing-extra"),
    errors.WrongMachineError: (Exit.NOT_NOW, "wrong-machine"),
    errors.OtherMachineError: (Exit.NOT_NOW, "other-machine"),
}
"""Exit code and code word of each error class. Both are promised to scripts: add rows, change none."""

Failure = tuple[Exit, "str | None"]
"""Exit code and code word; :attr:`Exit.DONE` and ``None`` where nothing failed."""


def kind_of(error: BaseException) -> tuple[Exit, str]:
    """Return the exit code and the code word of ``error``; those of the root for an error of another library."""
    return next((KINDS[base] for base in type(error).__mro__ if base in KINDS), KINDS[PipevaultError])


def first_of(failures: Iterable[Failure]) -> Failure:
    return next((failure for failure in failures if failure[0]), (Exit.DONE, None))


def message_of(error: BaseException) -> str:
    """Return the message of ``error`` in one line, with the class of an error of another library before it."""
    text = " ".join(str(error).split())
    return text if isinstance(error, PipevaultError) else f"{type(error).__name__}: {text}"


def text_of(error: BaseException) -> str:
    """Return the code word and the message of ``error``, such as ``miss: There is none.``."""
    return f"{kind_of(error)[1]}: {message_of(error)}"


def error_document(error: BaseException) -> dict[str, Any]:
    return {"code": kind_of(error)[1], "message": message_of(error)}


def show_traceback(error: BaseException) -> None:
    if os.environ.get(DEBUG_VARIABLE) == "1":
        import traceback

        render.say("".join(traceback.format_exception(error)), err=True, nl=False)


def report(error: BaseException, *, as_json: bool = False) -> Exit:
    """Print ``error`` as one line on standard error, with ``as_json`` also as the document if there is none; return its
    exit code.
    """
    show_traceback(error)
    text = text_of(error)
    if not isinstance(error, PipevaultError):
        text = f"{text.rstrip('.')}. {DEBUG_VARIABLE}=1 shows where it was raised."
    with suppress(CannotSaveError):  # of a full disk behind both: the exit code is all that is left
        render.note(f"pipevault: {text}")
    with suppress(CannotSaveError):
        if as_json and not render.has_answered():
            render.print_json(error_document(error))
    return kind_of(error)[0]
