"""Turns: which thread may use what only one of them can use at a time.

A thread asks for all that it needs at once, and requests are served in the order in which they came. A resource is held
by one thread alone, or by all those that want it in the same way: generations that need the same switches of torch run
side by side, others wait. What a thread holds it may ask for again, at any depth. A thread that holds something and
asks for more does not queue behind others, who may be waiting for what it holds.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

from pipevault.errors import DeadlockError, TurnTimeoutError

ALONE = None
"""The way to want a resource that no other thread may hold meanwhile."""

DEFAULT_TIMEOUT_S = 3600.0

Wanted: TypeAlias = Mapping[Hashable, Hashable]
"""For each resource :data:`ALONE`, or a value: threads that want it with an equal value hold it together."""


@dataclass(eq=False)
class _Request:
    wanted: Wanted
    what: str
    thread: int = field(default_factory=threading.get_ident)
    name: str = field(default_factory=lambda: threading.current_thread().name)
    granted: threading.Event = field(default_factory=threading.Event)
    since_s: float = field(default_factory=time.monotonic)


class Turns:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: list[_Request] = []
        self._waiting: list[_Request] = []
        self._on_fork: list[Callable[[], None]] = []
        os.register_at_fork(
            before=lambda: self._lock.acquire(),
            after_in_parent=lambda: self._lock.release(),
            after_in_child=self._forget_other_threads,
        )

    @contextmanager
    def take(self, wanted: Wanted, *, what: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> Iterator[float]:
        """Hold everything ``wanted`` inside; yield the seconds that were spent waiting. ``what`` says for messages of
        other threads what holds it. Raises :class:`TurnTimeoutError` after ``timeout_s``, and :class:`DeadlockError` at
        once where the threads that stand in the way wait for this one.
        """
        own = self._own()
        if all(any(name in held and held[name] == way for held in own) for name, way in wanted.items()):
            yield 0.0  # nothing changes by holding it again in this very way
            return
        request = _Request(wanted, what)
        waited_s = self._wait(request, timeout_s)
        try:
            yield waited_s
        finally:
            with self._lock:
                self._held.remove(request)
                self._grant()

    def holds(self, resource: Hashable) -> bool:
        """Return whether this thread holds ``resource``."""
        return any(resource in held for held in self._own())

    def _own(self) -> list[Wanted]:
        with self._lock:
            return [request.wanted for request in self._held if request.thread == threading.get_ident()]

    def on_fork(self, action: Callable[[], None]) -> None:
        """Have ``action`` called in each forked child, once what its parent's other threads held is forgotten."""
        self._on_fork.append(action)

    def _wait(self, request: _Request, timeout_s: float) -> float:
        with self._lock:
            self._waiting.append(request)
            self._grant()
            if request.granted.is_set():
                return 0.0
            if cycle := self._waits_for_itself(request):
                self._waiting.remove(request)
                raise DeadlockError(
                    f"{request.what} would wait for ever: thread {cycle.name!r}, which holds {_named(cycle)}, waits "
                    "for what this thread holds. Where threads call a pipeline inside a call of another one, let "
                    "them do so in one order."
                )
        try:
            is_granted = request.granted.wait(timeout_s)
        except BaseException:  # an interrupt: whatever it was goes on
            with self._lock:
                (self._held if request.granted.is_set() else self._waiting).remove(request)
                self._grant()
            raise
        waited_s = time.monotonic() - request.since_s
        if is_granted:
            return waited_s
        with self._lock:
            holders = [other for other in self._held if _excludes(other, request)]
            if request.granted.is_set():  # between the time-out and the lock
                return waited_s
            self._waiting.remove(request)
            self._grant()
        raise TurnTimeoutError(
            f"{request.what} waited {waited_s:.0f} s for its turn: "
            f"{'; '.join(f'thread {h.name!r} holds {_named(h)}' for h in holders) or 'others were before it'}. Wait "
            "longer (turn_timeout_s), or have fewer threads call it.",
            waited_s,
        )

    def _grant(self) -> None:
        """Grant what can be granted, in the order of asking."""
        for request in tuple(self._waiting):
            if next(self._obstacles(request), None) is None:
                self._waiting.remove(request)
                self._held.append(request)
                request.granted.set()

    def _obstacles(self, request: _Request) -> Iterator[_Request]:
        """The requests of other threads that must end before ``request``, which waits, can be granted."""
        before = self._waiting[: self._waiting.index(request)]
        if any(other.thread == request.thread for other in self._held):
            before = []
        return (other for other in (*self._held, *before) if _excludes(other, request))

    def _waits_for_itself(self, request: _Request) -> _Request | None:
        """The obstacle that waits, over others perhaps, for the thread of ``request``."""
        if not any(other.thread == request.thread for other in self._held):
            return None  # nothing can wait for a thread that holds nothing
        for first in self._obstacles(request):
            threads = [first.thread]
            for thread in threads:  # it grows by those that each one waits for
                waiting = [other for other in self._waiting if other.thread == thread]
                found = {other.thread for one in waiting for other in self._obstacles(one)}
                threads += found.difference(threads)
            if request.thread in threads:
                return first
        return None

    def _forget_other_threads(self) -> None:
        """In a forked child only the thread that forked goes on."""
        own = threading.get_ident()
        self._lock = threading.Lock()
        self._held = [request for request in self._held if request.thread == own]
        self._waiting = []
        for action in self._on_fork:
            action()


def _excludes(one: _Request, other: _Request) -> bool:
    return one.thread != other.thread and any(
        name in one.wanted and (way is ALONE or way != one.wanted[name]) for name, way in other.wanted.items()
    )


def _named(request: _Request) -> str:
    return f"{request.what} since {time.monotonic() - request.since_s:.0f} s"


TURNS = Turns()
"""The turns of this process."""
