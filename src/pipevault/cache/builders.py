"""Compiling in several processes at once, within the memory that there is.

This process observes and checks, which takes the weights; what is compiled goes to others as an outline: the modules
with weights of the right shapes and without their values. A part that cannot be sent, such as one whose class stands in
the program itself, is compiled here, and so are those for a GPU, whose kernels are compiled in processes anyway.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import math
import os
import pickle
import resource
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pipevault import errors
from pipevault.compat.pytorch import changed_inductor_options, with_inductor_options
from pipevault.determinism.flags import code_flags
from pipevault.determinism.levels import level as at_level
from pipevault.errors import CannotFreezeError, InterruptedBuildError
from pipevault.files.memory import available_memory_bytes
from pipevault.graphs.compiler_cache import HEADERS_PAY_FROM, probe_vector_isa
from pipevault.graphs.inductor import Build, BuiltGraph
from pipevault.graphs.signature import describe_call
from pipevault.graphs.state import PartState, PendingBuild
from pipevault.graphs.views import outline, with_empty_weights

logger = logging.getLogger("pipevault")

RESULT_FILE = "result.pkl"
MAX_AHEAD = 2
"""The number of graphs that wait in another process: their inputs lie in the temporary folder meanwhile."""
EXPECTED_PEAK_BYTES = 1_500_000_000
"""The memory that a process which compiles is taken to need, until one has shown what it needs."""


def environment() -> dict[str, str]:
    """Return the environment of a process that is to find the modules of this one."""
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@dataclass
class Work:
    """A graph to compile for a part. ``started`` is called when that begins, ``failed`` with what
    :meth:`PartState.end_ahead` raised. ``job`` is the file that another process was sent last.
    """

    state: PartState
    pending: PendingBuild
    started: Callable[[], None]
    failed: Callable[[CannotFreezeError], None]
    is_one_of_many: bool = False
    job: Path = Path()

    @property
    def build(self) -> Build:
        return replace(self.pending.build, is_one_of_many=self.is_one_of_many)

    def start(self) -> None:
        self.pending.compiled_s = time.perf_counter()
        self.started()

    def end(self, build: Callable[[], BuiltGraph]) -> None:
        try:
            self.state.end_ahead(self.pending, build)
        except CannotFreezeError as error:
            self.failed(error)

    def prepare_check(self) -> bool:
        """Run eager code once that the graph will be compared with; ``False`` once all of it has run."""
        try:
            return self.state.run_eagerly_ahead(self.pending)
        except Exception:  # whatever it is, the check meets it again
            return False

    def build_here(self) -> None:
        self.start()
        self.end(lambda: self.build.run(self.pending.folder))


class Builders:
    """The processes that compile: as many as ``jobs`` says, this one among them. They end with the context."""

    def __init__(self, jobs: int, level: str, mean_s: float | None = None) -> None:
        """``mean_s``: the seconds that earlier graphs of the vault took, on average."""
        self._jobs = jobs
        self._mean_s = mean_s
        self._level = level
        self._waiting: list[Work] = []
        self._count = 0
        self._own: list[Work] = []
        """Work that cannot be sent to another process."""
        self._busy: dict[_Builder, list[Work | None]] = {}
        """The graphs each was sent and has not answered, the one it works at first; ``None`` for one taken back."""
        self._idle: list[_Builder] = []
        self._numbers = itertools.count()
        self._stack = ExitStack()
        self._selector = selectors.DefaultSelector()
        self.peak_bytes = 0
        """The most memory that one of the other processes needed."""

    def __enter__(self) -> Builders:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self._selector.close()

    def start_one(self) -> None:
        """Start a process that will be needed soon: it imports the compiler meanwhile, which takes seconds."""
        if not self._busy and not self._idle and self._has_room():
            self._idle.append(self._started())

    def estimate(self, count: int) -> str:
        """Return what compiling so many graphs is, and how long it may take."""
        rounds = math.ceil(count / self._jobs)
        about = f", about {rounds * self._mean_s:.0f} s as earlier ones took" if self._mean_s else ""
        return f"{count} graph{'s' if count > 1 else ''}{about}"

    def offer(self, work: Work, *, more: int) -> None:
        """Take ``work``. Another process begins with it if one has room; :meth:`build_all` does the rest.

        Without ``more`` to come one is left for this process.
        """
        self._count = max(self._count, 1 + more)
        work.is_one_of_many = self._count >= HEADERS_PAY_FROM
        self._waiting.append(work)
        self._send_all(keep=0 if more else 1)

    def build_all(self) -> None:
        """Compile all that was offered, and end each."""
        while self._waiting or self._own or self._busy:
            self._send_all(keep=0 if self._own else 1)
            mine = self._own or self._waiting
            if (work := mine.pop(0) if mine else self._taken_back()) is not None:
                self._send_ahead()
                work.build_here()
                is_idle = False
            else:
                is_idle = not any(work.prepare_check() for works in self._busy.values() for work in works if work)
            self._receive(wait=is_idle)

    def abandon(self) -> None:
        """Let nothing of what was offered be compiled any longer."""
        for builder in self._busy:
            builder.stop()
        self._waiting, self._own = [], []

    def _send_all(self, *, keep: int) -> None:
        while len(self._waiting) > keep and self._has_room():
            work = self._waiting.pop(0)
            if not self._send(work):
                self._own.append(work)

    def _has_room(self) -> bool:
        if len(self._busy) >= self._jobs - 1:
            return False
        if self._idle:
            return True
        return available_memory_bytes() > 2 * max(self.peak_bytes, EXPECTED_PEAK_BYTES)

    def _send_ahead(self) -> None:
        """Give the other processes more than they work at, so that none waits while this one compiles."""
        while self._waiting and self._busy:
            builder, works = min(self._busy.items(), key=lambda item: len(item[1]))
            if len(works) > MAX_AHEAD:
                break
            work = self._waiting.pop(0)
            if not self._send(work, builder):
                self._own.append(work)

    def _taken_back(self) -> Work | None:
        """Return a graph that another process was sent ahead and has not begun with."""
        for works in sorted(self._busy.values(), key=len, reverse=True):
            for index in range(len(works) - 1, 0, -1):
                if (work := works[index]) is not None and _take(work.job) is not None:
                    works[index] = None
                    return work
        return None

    def _send(self, work: Work, to: _Builder | None = None) -> bool:
        build = work.build
        if build.options.weights == "baked" or any(p.device.type != "cpu" for p in build.module.parameters()):
            return False
        try:
            job = {
                "build": replace(build, module=outline(build.module)),
                "values": build.program.values(build.leaves),
                "threads": torch.get_num_threads(),
                "default_dtype": torch.get_default_dtype(),
                "level": self._level,
                "flags": code_flags(),
                "inductor": changed_inductor_options(),
            }
            # Under a name of its own, which a process that was sent the graph before does not know.
            work.job = work.pending.folder / f"job-{next(self._numbers)}.pt"
            torch.save(job, work.job)
        except Exception as error:  # whatever the attributes of a module raise when they are pickled
            logger.info("%s is compiled here: it cannot be sent: %s", work.state.name, error)
            return False
        if to is None:
            to = self._idle.pop() if self._idle else self._started()
            work.start()
        to.send(work.job)
        self._busy.setdefault(to, []).append(work)
        return True

    def _started(self) -> _Builder:
        builder = _Builder()
        self._stack.callback(builder.stop)
        self._selector.register(builder.replies, selectors.EVENT_READ, builder)
        return builder

    def _receive(self, *, wait: bool) -> None:
        if not self._busy:
            return
        for key, _ in self._selector.select(None if wait else 0):
            builder: _Builder = key.data
            work, *ahead = self._busy.pop(builder, [None])
            if builder.receive():
                if ahead:
                    self._busy[builder] = ahead
                    if ahead[0] is not None:
                        ahead[0].start()
                else:
                    self._idle.append(builder)
                    if not self._waiting and (other := self._taken_back()) is not None:
                        self._waiting.append(other)
                    self._send_all(keep=0)  # before this process is busy with the check
            else:
                self._selector.unregister(builder.replies)
                if builder in self._idle:  # it ended with nothing to do
                    self._idle.remove(builder)
                if work is not None and _take(work.job) is not None:
                    logger.info("graphs are compiled here: another process ended with %s", builder.exit_code())
                    self._jobs = 1
                    ahead, work = [work, *ahead], None
                self._waiting += [one for one in ahead if one is not None]
            if work is not None:
                work.end(partial(self._result, work, builder))

    def _result(self, work: Work, builder: _Builder) -> BuiltGraph:
        try:
            kind, content, peak_bytes, seconds = pickle.loads((work.pending.folder / RESULT_FILE).read_bytes())
        except (OSError, EOFError, pickle.UnpicklingError):
            if builder.is_alive():  # whatever has removed the files, the graph can be made
                return work.build.run(work.pending.folder)
            raise InterruptedBuildError(
                f"The process that compiled {work.state.name} ended with {builder.exit_code()}. It may have been "
                "killed for lack of memory: free memory, or set jobs to 1, and try again.",
                work.state.name,
            ) from None
        self.peak_bytes = max(self.peak_bytes, peak_bytes)
        work.pending.compiled_s = time.perf_counter() - seconds
        if kind == "built":
            built: BuiltGraph = content
            return built
        if kind == "unlike":
            logger.info("%s is compiled here: %s", work.state.name, content)
            return work.build.run(work.pending.folder)
        name, message = content
        raise getattr(errors, name, CannotFreezeError)(message, work.state.name)


class _Builder:
    """Another process that compiles, one graph after the other."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipevault.cache.builders"],
            bufsize=0,  # nothing is left to be written where the process has ended
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.replies: Any = self._process.stdout
        self.exit_code = self._process.wait

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def send(self, job: Path) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which its replies tell
            self._process.stdin.write(os.fsencode(job) + b"\n")

    def receive(self) -> bool:
        """Take one reply; ``False`` where the process has ended."""
        return bool(self.replies.readline())

    def stop(self) -> None:
        with self._process as process:  # closes its streams
            process.kill()


def main() -> int:
    """Compile the job that each line of the standard input names: what another process runs."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the compiler prints is not a reply
    importlib.import_module("torch._inductor.compile_fx")
    probe_vector_isa()
    for line in sys.stdin.buffer:
        job = Path(os.fsdecode(line.rstrip(b"\n")))
        folder, started_s = job.parent, time.perf_counter()
        result: tuple[str, Any]
        if (taken := _take(job)) is None:  # another process does it
            _answer(replies)
            continue
        try:
            result = "built", _built(folder, taken)
        except errors.PipevaultError as error:
            result = "failed", (type(error).__name__, str(error))
        except Exception as error:  # whatever it is that this process lacks, the other one has it
            result = "unlike", f"another process cannot: {type(error).__name__}: {error}"
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        (folder / f".{RESULT_FILE}").write_bytes(pickle.dumps((*result, peak_bytes, time.perf_counter() - started_s)))
        os.replace(folder / f".{RESULT_FILE}", folder / RESULT_FILE)
        _answer(replies)
    return 0


def _answer(replies: BinaryIO) -> None:
    replies.write(b"done\n")
    replies.flush()


def _take(job: Path) -> Path | None:
    """Return the file of ``job``, for this process alone; ``None`` if another one has it."""
    taken = job.with_suffix(".taken")
    try:
        os.rename(job, taken)
    except FileNotFoundError:
        return None
    return taken


def _built(folder: Path, job_file: Path) -> BuiltGraph:
    # The file is this user's own, in a folder that no other user can write.
    job = torch.load(job_file, weights_only=False)
    build: Build = job["build"]
    torch.set_num_threads(job["threads"])
    torch.set_default_dtype(job["default_dtype"])
    describe_call(job["values"], {})  # so that this process knows the containers in them
    autocast = build.program.signature.autocast
    with ExitStack() as stack:
        stack.enter_context(at_level(job["level"]))
        stack.enter_context(with_inductor_options(job["inductor"]))
        if (flags := code_flags()) != job["flags"]:
            different = sorted(name for name in flags if flags[name] != job["flags"].get(name))
            raise RuntimeError(f"its switches differ: {', '.join(different)}")
        stack.enter_context(torch.autocast("cpu", getattr(torch, autocast or "bfloat16"), enabled=autocast is not None))
        return replace(build, module=with_empty_weights(build.module)).run(folder)


if __name__ == "__main__":
    sys.exit(main())
