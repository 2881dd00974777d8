"""Levels of determinism, how much is done for the same bits: a context manager that reads back what it set.

========== ================================================================================================
level      switches that :func:`level` sets inside
========== ================================================================================================
off        none
seeded     none: ``seed=`` means the same at every level
repeatable nothing is tuned while the program runs (``cudnn.benchmark`` and TunableOp's tuning off), cuBLAS has a fixed
           workspace; precision, attention backend and threads stay as the program chose and are put in ``flags``
strict     + ``torch.use_deterministic_algorithms``, Inductor's deterministic mode, deterministic cuDNN and oneDNN,
           IEEE float32, no reduced-precision reductions in float16 and bfloat16
invariant  as strict; :attr:`AchievedLevel.per_sample` tells who generates to run each sample on its own
========== ================================================================================================

The switches are the process's own. Threads whose levels need the same switches hold them together, and the last one out
puts back what the program had; a thread that needs others waits for its turn. A block inside another one adds to it,
also in a thread that was given the context of the outer block (``asyncio.to_thread`` does).
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pipevault.determinism.switches import CUBLAS_VARIABLE, FLAGS, IEEE, PRECISION_OPERATIONS, Flag
from pipevault.determinism.turns import DEFAULT_TIMEOUT_S, TURNS
from pipevault.digest import canonical_json
from pipevault.errors import SettingsError
from pipevault.settings import LEVELS, PROFILES, split_level

__all__ = ["LEVELS", "PROFILES", "AchievedLevel", "Level", "current_level", "level", "parse_level", "resolve_level"]

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
    """A level. ``name`` is one of :data:`LEVELS`. ``audit``: the latents of each step are to be hashed."""

    name: str
    audit: bool = False

    def __str__(self) -> str:
        return f"{self.name}+audit" if self.audit else self.name

    def includes(self, name: str) -> bool:
        """Return True if this level does all that ``name`` does."""
        return LEVELS.index(self.name) >= LEVELS.index(name)


@dataclass(frozen=True)
class AchievedLevel:
    """The level that was reached.

    ``level`` is below the one asked for where a switch did not take, and ``notes`` say which. ``flags`` are
    the switches as read back, plain JSON. ``per_sample``: each sample is to be run on its own.
    """

    level: str
    flags: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    per_sample: bool = False
    audit: bool = False
    wanted: Mapping[str, tuple[Any, str]] = field(default_factory=dict, repr=False, compare=False)
    """The value of each switch that was asked for, and the level that needs it."""

    def check_again(self) -> AchievedLevel:
        """Return what the level comes to by now, where something set a switch after it."""
        changed = {name: FLAGS[name].read() for name in self.wanted if FLAGS[name].read() != self.flags[name]}
        reached, notes = self.level, list(self.notes)
        for name, value in changed.items():
            if self.flags[name] == self.wanted[name][0]:
                reached = min(reached, _LEVEL_BELOW[self.wanted[name][1]], key=LEVELS.index)
            notes.append(f"{name} was set to {value!r} while the level was held, by something else in this process.")
        return replace(self, level=reached, notes=tuple(notes)) if changed else self


def parse_level(text: str | Level) -> Level:
    """Return the level of ``"strict"``, ``"strict+audit"``, or a profile such as ``"production"``.

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


SWITCHES = "switches"
"""The resource of :data:`~pipevault.determinism.turns.TURNS` that threads with equal :func:`needs` hold together."""


class _Group:
    """Blocks that need the same switches, and the switches as they were before the first of them."""

    def __init__(self, needs: Hashable) -> None:
        self.needs = needs
        self.members: list[int] = []  # their threads
        self.states: dict[str, Any] = {}
        self.values: dict[str, Any] = {}


class _Groups:
    """Sets the switches for the first block of a group, and puts them back after the last one.

    A second group stands on the first only inside one thread: turns keep others out.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._stack: list[_Group] = []
        TURNS.on_fork(self._put_back_in_child)

    def read(self, name: str) -> Any:
        """The program's own value of a switch."""
        with self._lock:
            first = next((group for group in self._stack if name in group.values), None)
            return FLAGS[name].read() if first is None else first.values[name]

    @contextmanager
    def joined(self, needs: Hashable, wanted: Mapping[str, tuple[Any, str]]) -> Iterator[None]:
        own = {name: flag.state() for name, flag in FLAGS.items() if flag.per_thread} if wanted else {}
        with self._lock:
            group = self._stack[-1] if self._stack and self._stack[-1].needs == needs else None
            if group is None:
                group = _Group(needs)
                self._stack.append(group)
            group.members.append(threading.get_ident())
            if wanted and not group.states:
                shared = {name: flag for name, flag in FLAGS.items() if not flag.per_thread}
                group.values = {name: flag.read() for name, flag in shared.items()}
                group.states = {name: flag.state() for name, flag in shared.items()}
        try:
            yield
        finally:
            with ExitStack() as stack:
                for name, state in own.items():
                    stack.callback(_put_back, FLAGS[name], state)
                stack.callback(self._leave, group)

    def _leave(self, group: _Group) -> None:
        with self._lock:
            group.members.remove(threading.get_ident())
            if group.members:
                return
            place = self._stack.index(group)
            del self._stack[place]
            if place < len(self._stack):  # left before a block inside it: that one puts back what this one found
                self._stack[place].states, self._stack[place].values = group.states, group.values
                return
            self._put_back(group)

    def _put_back(self, group: _Group) -> None:
        with ExitStack() as stack:
            for name in reversed(group.states):  # an ExitStack runs backwards: put back in the table's order
                stack.callback(_put_back, FLAGS[name], group.states[name])

    def _put_back_in_child(self) -> None:
        """A forked child has the switches of its program, not those of blocks that go on in its parent's threads."""
        self._lock = threading.RLock()
        if self._stack and not TURNS.holds(SWITCHES):
            groups, self._stack = self._stack, []
            self._put_back(groups[0])
        for group in self._stack:
            group.members = [thread for thread in group.members if thread == threading.get_ident()]


_GROUPS = _Groups()

_AROUND: ContextVar[Mapping[str, tuple[Any, str]] | None] = ContextVar("pipevault_switches", default=None)
"""The switches that the levels around the caller want."""


@contextmanager
def level(
    name: str | Level, *, pins: Mapping[str, Any] | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
) -> Iterator[AchievedLevel]:
    """Set the switches of a level inside, yield what was achieved, and put everything back on exit.

    ``pins``: values of switches to hold at ``repeatable`` and above where the level itself has none, such as
    ``{"threads": 4}`` or the :attr:`AchievedLevel.flags` under which a graph was frozen. Raises
    :class:`UnknownLevelError` for an unknown level, :class:`SettingsError` for an unknown pin, and
    :class:`TurnTimeoutError` after ``timeout_s`` where other threads hold switches that exclude these.
    """
    asked = parse_level(name)
    wanted = _wanted(asked, pins or {})
    total = {**(_AROUND.get() or {}), **wanted}
    with _turn(asked, total, timeout_s):
        token, around = _CURRENT.set(asked), _AROUND.set(total)
        try:
            with _GROUPS.joined(_needs(total), total):
                yield _achieve(asked, wanted)
        finally:
            _AROUND.reset(around)
            _CURRENT.reset(token)


def needs(asked: Level) -> Hashable:
    """Return what a generation at this level wants of :data:`SWITCHES`: equal for those that may run side by side."""
    return _needs({**(_AROUND.get() or {}), **_wanted(asked, {})})


@contextmanager
def _turn(asked: Level, total: Mapping[str, tuple[Any, str]], timeout_s: float) -> Iterator[None]:
    """Hold the switches as ``total`` needs them; the program may set some while this thread waits."""
    while True:
        before = _needs(total)
        with TURNS.take({SWITCHES: before}, what=f"level {asked}", timeout_s=timeout_s):
            if _needs(total) == before:
                yield
                return


def _needs(total: Mapping[str, tuple[Any, str]]) -> Hashable:
    """The switches that the program has not set like this itself."""
    shared = {name: value for name, (value, _) in total.items() if not FLAGS[name].per_thread}
    return canonical_json({name: value for name, value in shared.items() if _GROUPS.read(name) != value})


def _wanted(asked: Level, pins: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Value of each switch to set, and the level that needs it."""
    if unknown := set(pins) - set(FLAGS):
        raise SettingsError(f"Unknown switch {', '.join(sorted(unknown))}. Switches: {', '.join(FLAGS)}.")
    if not asked.includes("repeatable"):
        return {}
    values = {**pins, **_REPEATABLE}
    backends: Any = torch.backends
    if backends.cuda.is_built():
        workspace = pins.get("cublas_workspace") or _GROUPS.read("cublas_workspace")
        fits = workspace in _DETERMINISTIC_WORKSPACES
        values["cublas_workspace"] = workspace if fits else CUBLAS_WORKSPACE
    wanted = {name: (value, "repeatable") for name, value in values.items()}
    if asked.includes("strict"):
        wanted |= {name: (value, "strict") for name, value in _STRICT.items()}
    return {name: wanted[name] for name in FLAGS if name in wanted}


def _achieve(asked: Level, wanted: Mapping[str, tuple[Any, str]]) -> AchievedLevel:
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
    return AchievedLevel(
        achieved, flags, tuple(notes), per_sample=asked.name == "invariant", audit=asked.audit, wanted=wanted
    )


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
