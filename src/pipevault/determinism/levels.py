"""Levels of determinism, how much is done for the same bits: a context manager that reads back what it set.

``off`` and ``seeded`` set no switch. At ``repeatable`` nothing is tuned while the program runs and cuBLAS has a fixed
workspace; precision, attention backend and threads stay as the program chose and are put in ``flags``. ``strict`` adds
deterministic algorithms and IEEE precision. ``invariant`` is as strict; :attr:`AchievedLevel.per_sample` tells who
generates to run each sample on its own.

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
from typing import Any, TypeAlias

import torch

from pipevault.determinism.switches import CUBLAS_VARIABLE, FLAGS, FLOAT16_SWITCHES, IEEE, PRECISION_OPERATIONS
from pipevault.determinism.turns import DEFAULT_TIMEOUT_S, TURNS
from pipevault.digest import canonical_json
from pipevault.errors import SettingsError
from pipevault.settings import LEVELS, split_level

SWITCHES = "switches"
"""The resource of :data:`~pipevault.determinism.turns.TURNS` that threads with equal :func:`needs` hold together."""

Wanted: TypeAlias = Mapping[str, tuple[Any, str]]
"""The value of each switch to set, and the level that needs it."""

_DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
"""https://docs.nvidia.com/cuda/cublas/index.html#results-reproducibility"""

_REPEATABLE: Mapping[str, Any] = {"cudnn_benchmark": False, "run_time_tuning": False}
_STRICT: Mapping[str, Any] = {
    "deterministic_algorithms": "error",
    "inductor_deterministic": True,
    "cudnn_deterministic": True,
    "mkldnn_deterministic": True,
    "float32_precision": dict.fromkeys(PRECISION_OPERATIONS, IEEE),
    **dict.fromkeys(FLOAT16_SWITCHES, False),
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
    """The level that was reached, below the one asked for where a switch did not take: ``notes`` say which.

    ``flags`` are the switches as read back, plain JSON. ``per_sample``: each sample is to be run on its own.
    """

    level: str
    flags: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    per_sample: bool = False
    wanted: Wanted = field(default_factory=dict, repr=False, compare=False)

    def check_again(self) -> AchievedLevel:
        """Return what the level comes to by now, where something set a switch after it."""
        reached, notes = self.level, list(self.notes)
        for name, (asked, needed_by) in self.wanted.items():
            if (value := FLAGS[name].read()) == self.flags[name]:
                continue
            if self.flags[name] == asked:
                reached = min(reached, _LEVEL_BELOW[needed_by], key=LEVELS.index)
            notes.append(f"{name} was set to {value!r} while the level was held, by something else in this process.")
        return replace(self, level=reached, notes=tuple(notes))


def parse_level(text: str | Level) -> Level:
    """Return the level of ``"strict"``, ``"strict+audit"``, a profile; raise :class:`UnknownLevelError` for others."""
    return text if isinstance(text, Level) else Level(*split_level(text))


@dataclass(eq=False)
class _Group:
    """Blocks that need the same switches, and the switches as they were before the first of them."""

    needs: Hashable
    threads: list[int] = field(default_factory=list)
    """The thread of each block."""
    states: dict[str, Any] = field(default_factory=dict)

    def put_back(self) -> None:
        with ExitStack() as stack:
            for name in reversed(self.states):  # an ExitStack runs backwards: put back in the table's order
                stack.callback(FLAGS[name].put_back, self.states[name])


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
            first = next((group for group in self._stack if name in group.states), None)
            return FLAGS[name].read() if first is None else FLAGS[name].plain(first.states[name])

    @contextmanager
    def joined(self, needs: Hashable, wanted: Wanted) -> Iterator[None]:
        own = {name: flag.state() for name, flag in FLAGS.items() if flag.per_thread} if wanted else {}
        with self._lock:
            if not self._stack or self._stack[-1].needs != needs:
                self._stack.append(_Group(needs))
            group = self._stack[-1]
            group.threads.append(threading.get_ident())
            if wanted and not group.states:
                group.states = {name: flag.state() for name, flag in FLAGS.items() if not flag.per_thread}
        with ExitStack() as stack:
            for name, state in own.items():
                stack.callback(FLAGS[name].put_back, state)
            stack.callback(self._leave, group)
            yield

    def _leave(self, group: _Group) -> None:
        with self._lock:
            group.threads.remove(threading.get_ident())
            if group.threads:
                return
            place = self._stack.index(group)
            del self._stack[place]
            if place < len(self._stack):  # left before a block inside it: that one puts back what this one found
                self._stack[place].states = group.states
            else:
                group.put_back()

    def _put_back_in_child(self) -> None:
        """A forked child has the switches of its program, not those of blocks that go on in its parent's threads."""
        self._lock = threading.RLock()
        if self._stack and not TURNS.holds(SWITCHES):
            groups, self._stack = self._stack, []
            groups[0].put_back()
        for group in self._stack:
            group.threads = [thread for thread in group.threads if thread == threading.get_ident()]


_GROUPS = _Groups()

_AROUND: ContextVar[Wanted | None] = ContextVar("pipevault_switches", default=None)
"""The switches that the levels around the caller want."""


@contextmanager
def level(
    name: str | Level, *, pins: Mapping[str, Any] | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
) -> Iterator[AchievedLevel]:
    """Set the switches of a level inside, yield what was achieved, and put everything back on exit.

    ``pins``: values of switches to hold at ``repeatable`` and above where the level itself has none, such as
    ``{"threads": 4}``. Raises :class:`UnknownLevelError`, :class:`SettingsError` for an unknown pin, and
    :class:`TurnTimeoutError` after ``timeout_s`` where other threads hold switches that exclude these.
    """
    asked = parse_level(name)
    wanted = _wanted(asked, pins or {})
    total = {**(_AROUND.get() or {}), **wanted}
    while True:
        needed = _needs(total)
        with TURNS.take({SWITCHES: needed}, what=f"level {asked}", timeout_s=timeout_s):
            if _needs(total) != needed:  # the program set some while this thread waited
                continue
            around = _AROUND.set(total)
            try:
                with _GROUPS.joined(needed, total):
                    yield _achieve(asked, wanted)
            finally:
                _AROUND.reset(around)
            return


def needs(asked: Level) -> Hashable:
    """Return what a generation at this level wants of :data:`SWITCHES`: equal for those that may run side by side."""
    return _needs({**(_AROUND.get() or {}), **_wanted(asked, {})})


def _needs(total: Wanted) -> Hashable:
    """The switches that the program has not set like this itself."""
    shared = {name: value for name, (value, _) in total.items() if not FLAGS[name].per_thread}
    return canonical_json({name: value for name, value in shared.items() if _GROUPS.read(name) != value})


def _wanted(asked: Level, pins: Mapping[str, Any]) -> Wanted:
    if unknown := set(pins) - set(FLAGS):
        raise SettingsError(f"Unknown switch {', '.join(sorted(unknown))}. Switches: {', '.join(FLAGS)}.")
    if not asked.includes("repeatable"):
        return {}
    values = {**pins, **_REPEATABLE}
    backends: Any = torch.backends
    if backends.cuda.is_built():
        workspace = pins.get("cublas_workspace") or _GROUPS.read("cublas_workspace")
        fits = workspace in _DETERMINISTIC_WORKSPACES
        values["cublas_workspace"] = workspace if fits else _DETERMINISTIC_WORKSPACES[0]
    wanted = {name: (value, "repeatable") for name, value in values.items()}
    if asked.includes("strict"):
        wanted |= {name: (value, "strict") for name, value in _STRICT.items()}
    return {name: wanted[name] for name in FLAGS if name in wanted}


def _achieve(asked: Level, wanted: Wanted) -> AchievedLevel:
    notes = []
    reasons = {}
    for name, (value, _) in wanted.items():
        if FLAGS[name].read() == value:
            continue
        if name == "cublas_workspace" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            notes.append(
                f"CUDA had started before {CUBLAS_VARIABLE} was set, so cuBLAS may work with another workspace. "
                f"Set {CUBLAS_VARIABLE}={value} before the program starts."
            )
        reasons[name] = _set(name, value)
    flags = {name: flag.read() for name, flag in FLAGS.items()}
    achieved = asked.name
    for name, (value, needed_by) in wanted.items():
        if flags[name] != value:
            achieved = min(achieved, _LEVEL_BELOW[needed_by], key=LEVELS.index)
            notes.append(f"{name} is {flags[name]!r} where {value!r} was to be set{reasons.get(name, '')}.")
    return AchievedLevel(achieved, flags, tuple(notes), per_sample=asked.name == "invariant", wanted=wanted)


def _set(name: str, value: Any) -> str:
    """Set it; why it could not be set, in words that follow a note."""
    write = FLAGS[name].write
    if write is None:
        return ": it can only be observed"
    try:
        write(value)
    except RuntimeError as error:  # torch.backends.disable_global_flags() was called
        return f": {error}"
    return ""
