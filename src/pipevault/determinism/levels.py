"""How much is done for the same bits: the levels, as a context manager that reads back what it set.

========== ================================================================================================
level      switches that :func:`level` sets inside
========== ================================================================================================
off        none
seeded     none; who generates seeds every layer and draws noise on the host (see ``seeds``, ``noise``)
repeatable nothing is tuned while the program runs (``cudnn.benchmark`` and TunableOp's tuning off), cuBLAS has a fixed
           workspace; precision, attention backend and threads stay as the program chose and are put in ``flags``
strict     + ``torch.use_deterministic_algorithms``, Inductor's deterministic mode, deterministic cuDNN and oneDNN,
           IEEE float32, no reduced-precision reductions in float16 and bfloat16
invariant  as strict; :attr:`Achieved.per_sample` tells who generates to run each sample on its own
========== ================================================================================================

The switches are the process's own, so threads that are at different levels at the same time disturb one another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from pipevault.determinism.switches import CUBLAS_VARIABLE, FLAGS, IEEE, PRECISION_OPERATIONS, Flag
from pipevault.errors import SettingsError
from pipevault.settings import LEVELS, PROFILES, split_level

__all__ = ["LEVELS", "PROFILES", "Achieved", "Level", "current_level", "level", "parse_level", "resolve_level"]

CUBLAS_WORKSPACE = ":4096:8"
_DETERMINISTIC_WORKSPACES = (CUBLAS_WORKSPACE, ":16:8")
"""https://docs.nvidia.com/cuda/cublas/index.html#results-reproducibility"""

_REPEATABLE: Mapping[str, Any] = {"cudnn_benchmark": False, "run_time_tuning": False}
_STRICT: Mapping[str, Any] = {
    "deterministic_algorithms": "error",
    "inductor_deterministic": True,
    "cudnn_deterministic": True,
    "mkldnn_deterministic": True,
    "float32_precision": dict.fromkeys(PRECISION_OPERATIONS, IEEE),
    "allow_fp16_reduced_precision_reduction": False,
    "allow_bf16_reduced_precision_reduction": False,
    "allow_fp16_accumulation": False,
}
_LEVEL_BELOW = {"repeatable": "seeded", "strict": "repeatable"}


@dataclass(frozen=True)
class Level:
    """``name`` is one of :data:`LEVELS`. ``audit``: the latents of each step are to be hashed."""

    name: str
    audit: bool = False

    def __str__(self) -> str:
        return f"{self.name}+audit" if self.audit else self.name

    def includes(self, name: str) -> bool:
        """Whether this level does all that ``name`` does."""
        return LEVELS.index(self.name) >= LEVELS.index(name)


@dataclass(frozen=True)
class Achieved:
    """What a level came to. ``level`` is below the one asked for where a switch did not take, and ``notes`` say which.

    ``flags`` are the switches as read back, plain JSON. ``per_sample``: each sample is to be run on its own.
    """

    level: str
    flags: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    per_sample: bool = False
    audit: bool = False


def parse_level(text: str | Level) -> Level:
    """``"strict"``, ``"strict+audit"``, or a profile such as ``"production"``.

    Raises :class:`UnknownLevelError`.
    """
    return text if isinstance(text, Level) else Level(*split_level(text))


_CURRENT: ContextVar[Level | None] = ContextVar("pipevault_level", default=None)


def current_level() -> Level | None:
    """The level of the innermost ``with level(...)`` around the caller."""
    return _CURRENT.get()


def resolve_level(argument: str | Level | None, *, default: str | Level) -> Level:
    """The level for one call: the argument, else that of the ``with level(...)`` around it, else ``default``."""
    return parse_level(argument) if argument is not None else current_level() or parse_level(default)


@contextmanager
def level(name: str | Level, *, pins: Mapping[str, Any] | None = None) -> Iterator[Achieved]:
    """Set the switches of a level inside, yield what was achieved, and put everything back on exit.

    ``pins``: values of switches to hold at ``repeatable`` and above where the level itself has none, such as
    ``{"threads": 4}`` or the :attr:`Achieved.flags` under which a graph was frozen. Raises
    :class:`UnknownLevelError` for an unknown level and :class:`SettingsError` for an unknown pin.
    """
    asked = parse_level(name)
    wanted = _wanted(asked, pins or {})
    token = _CURRENT.set(asked)
    try:
        with ExitStack() as put_back:
            if wanted:
                for flag in reversed(
                    tuple(FLAGS.values())
                ):  # an ExitStack runs backwards: put back in the table's order
                    put_back.callback(_put_back, flag, flag.state())
            yield _achieve(asked, wanted)
    finally:
        _CURRENT.reset(token)


def _wanted(asked: Level, pins: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Value of each switch to set, and the level that needs it."""
    if unknown := set(pins) - set(FLAGS):
        raise SettingsError(f"There is no switch {', '.join(sorted(unknown))}. Switches: {', '.join(FLAGS)}.")
    if not asked.includes("repeatable"):
        return {}
    workspace = pins.get("cublas_workspace") or FLAGS["cublas_workspace"].read()
    values = {
        **pins,
        **_REPEATABLE,
        "cublas_workspace": workspace if workspace in _DETERMINISTIC_WORKSPACES else CUBLAS_WORKSPACE,
    }
    wanted = {name: (value, "repeatable") for name, value in values.items()}
    if asked.includes("strict"):
        wanted |= {name: (value, "strict") for name, value in _STRICT.items()}
    return {name: wanted[name] for name in FLAGS if name in wanted}


def _achieve(asked: Level, wanted: Mapping[str, tuple[Any, str]]) -> Achieved:
    notes = []
    reasons = {}
    for name, (value, _) in wanted.items():
        if FLAGS[name].read() == value:
            continue
        if name == "cublas_workspace" and _cuda_has_started():
            notes.append(
                f"CUDA had started before {CUBLAS_VARIABLE} was set, so cuBLAS may work with another workspace. "
                f"Set {CUBLAS_VARIABLE}={value} before the program starts."
            )
        reasons[name] = _set(FLAGS[name], value)
    flags = {name: flag.read() for name, flag in FLAGS.items()}
    achieved = asked.name
    for name, (value, needed_by) in wanted.items():
        if flags[name] != value:
            achieved = min(achieved, _LEVEL_BELOW[needed_by], key=LEVELS.index)
            notes.append(f"{name} is {flags[name]!r} where {value!r} was to be set{reasons.get(name, '')}.")
    return Achieved(achieved, flags, tuple(notes), per_sample=asked.name == "invariant", audit=asked.audit)


def _cuda_has_started() -> bool:
    cuda: Any = torch.cuda
    return bool(cuda.is_initialized())


def _set(flag: Flag, value: Any) -> str:
    """Set it; why it could not be set, in words that follow a note."""
    if flag.write is None:
        return ": it can only be observed"
    try:
        flag.write(value)
    except RuntimeError as error:  # torch.backends.disable_global_flags() was called
        return f": {error}"
    return ""


def _put_back(flag: Flag, state: Any) -> None:
    if flag.write is not None and flag.state() != state:
        flag.write(state)
