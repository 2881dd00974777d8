"""The state of a frozen part: its graphs, and what it does with a call. The module itself is shared."""

from __future__ import annotations

import logging
import shutil
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from contextvars import Context
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from pipevault.compat.pytorch import without_modes
from pipevault.digest import Digest, digest_json
from pipevault.errors import (
    CannotFreezeError,
    ChangedPartError,
    CompilerMissingError,
    InterruptedBuildError,
    NotFiniteError,
    NothingFrozenError,
    StatefulPartError,
    TrainingModeError,
    UnfrozenCallError,
)
from pipevault.files.opened import open_verified
from pipevault.files.scratch import kept_scratch_folder, scratch_folder
from pipevault.graphs.check import compare_trees
from pipevault.graphs.document import ARTIFACTS, read_part, write_part
from pipevault.graphs.freezing import (
    FrozenCall,
    PreparedCall,
    SizedCall,
    Subject,
    finish_call,
    observe_call,
    part_device,
    prepare_call,
    range_signature,
    refuse_training,
)
from pipevault.graphs.frozen import FrozenGraph, GraphDocument
from pipevault.graphs.inductor import Build, BuildOptions, BuiltGraph
from pipevault.graphs.library import GraphFiles
from pipevault.graphs.observe import Attributes, PlainCall, copied, write_back, write_state
from pipevault.graphs.program import copied_leaves
from pipevault.graphs.signature import CallSignature, DescribedCall, describe_call
from pipevault.graphs.table import UNUSABLE, Found, Shelf, ShelfItem, Slot, Table

logger = logging.getLogger("pipevault")

_SCALARS = (bool, int, float, str)
_SET_BY_LOADS = frozenset({"options", "name", "part", "regions", "_table", "_device"})
MAX_VALUES = 8
"""Graphs of a part that differ in the values of numbers alone; one that asks for more counts its calls or the like."""

# Export and compile patch torch's global state, so that a process freezes one call at a time.
FREEZING = threading.RLock()
_OPENING = threading.Lock()
"""Held while the graphs in use of an entry are looked at, or become more."""


class _Generating(threading.local):
    """The parts of the pipelines that generate in this thread: their guard has looked at them."""

    parts: frozenset[int] = frozenset()
    rehearsing: bool = False


GENERATING = _Generating()


class Watch(Protocol):
    """The guard of a part that was compiled by hand; each method raises what is wrong."""

    def calling(self, state: PartState) -> None: ...

    def lacking(self, state: PartState) -> None:
        """Raise :class:`NothingFrozenError` if a part without graphs means that nothing at all can be saved."""

    def saving(self, state: PartState) -> Mapping[str, Any]:
        """Return the identity of the part for its document, as plain JSON."""

    def loading(self, state: PartState, identity: Mapping[str, Any] | None, path: Path) -> None:
        """Raise for a document of another identity; ``None`` stands in those that have none."""


@dataclass(frozen=True)
class PartOptions:
    """The ``options`` of ``compile_pipe(pipe, backend="inductor", options=…)``.

    ``policy`` says what a call does that has no graph: ``compile`` (it is frozen on the spot), ``eager``,
    ``background`` (eager now, frozen by another process for later calls) or ``error``; with ``off`` no graph runs.
    ``context`` names the settings that ``shelf`` follows, and graphs of another context are not used. ``shelf`` gives
    the shelf for a part as its weights are now; without it graphs live as long as the process. ``settings`` has
    Inductor's options as they were at the load: torch keeps them for each thread. ``guard`` looks at a part that is
    called outside of a generation, ``watch`` at one that belongs to no loaded pipeline. ``verify`` says what the graphs
    of a part whose sub-modules changed cannot follow, or nothing. ``background`` has a call frozen by another process;
    it returns why the call runs eagerly until then, and whether that will stay so. ``report`` is called for every step
    of a freeze, ``timed`` measures those of opening a graph.
    """

    policy: str = "compile"
    context: str = ""
    settings: Context | None = None
    build: BuildOptions = field(default_factory=BuildOptions)
    shelf: Callable[[str, nn.Module, torch.device], Shelf] | None = None
    guard: Callable[[str], None] | None = None
    watch: Watch | None = None
    verify: Callable[[Shelf | None, nn.Module], str] | None = None
    background: Callable[[PartState, Sequence[Any], Mapping[str, Any]], tuple[str, bool]] | None = None
    report: Callable[[str, str, float | None, str], None] = lambda part, action, seconds, detail: None
    timed: Callable[[str], AbstractContextManager[None]] = lambda action: nullcontext()
    freeze_hint: str = "Load the pipeline for such calls in mode 'compile'"


@dataclass
class PendingBuild:
    """A call whose graph is to be compiled into ``folder``. ``held`` has the lock of its shelf, and the folder."""

    prepared: PreparedCall
    table: Table
    signature: CallSignature
    folder: Path
    started_s: float
    held: ExitStack
    compiled_s: float = 0.0

    @property
    def build(self) -> Build:
        return self.prepared.build


Begun = TypeVar("Begun")


class PartState:
    def __init__(self, module: nn.Module, options: PartOptions) -> None:
        self.module = module
        self.name = type(module).__name__
        self.part = self.name
        """The part of the pipeline that the module is, or is a block of."""
        self.regions = ""
        """The number of blocks that the part is frozen by, and their classes; empty for one that is frozen whole."""
        self.options = options
        self.observer: Callable[[str, list[torch.Tensor], Any], None] | None = None
        self.capture: Callable[[PartState, Sequence[Any], Mapping[str, Any]], Any] | None = None
        """Makes, and looks at, each call that runs eagerly because the policy is ``off``."""
        self.hooked_forward: Callable[..., Any] | None = None
        self.trial: Callable[[str], None] | None = None
        self.holders: weakref.WeakSet[Any] = weakref.WeakSet()
        """The states of the loaded pipelines that have this part."""
        self.uses: Counter[str] = Counter()
        """The number of calls that ran a graph (``frozen``) or eager code (``eager``)."""
        self.touched: dict[str, Slot] = {}
        """The slots that calls used since :meth:`start_listing`, by key."""
        self.ran: dict[str, str] = {}
        """The graphs that calls ran since an observer cleared it: key, and digest of the library."""
        self.unstored: dict[CallSignature, str] = {}
        """The reasons why calls since then run eagerly, where no shelf knows them."""
        self._tables: dict[Any, Table] = {}
        self._table: Table | None = None
        self._device: torch.device
        self._scalars: list[tuple[dict[str, Any], str, Any]] = []
        self._told: set[CallSignature] = set()
        self._failed: dict[CallSignature, str] = {}

    @property
    def is_compiled(self) -> bool:
        """Tell ``save_pipe`` whether there is anything to save."""
        found = any(slot.kept.document for slot in self.table)
        if not found and self.options.watch is not None:
            self.options.watch.lacking(self)
        return found

    @property
    def table(self) -> Table:
        """The graphs for the weights as they were when the part was last called, or attached."""
        return self.table_on(None) if self._table is None else self._table

    @property
    def graphs(self) -> list[Slot]:
        return [slot for slot in self.table if slot.kept.document is not None]

    def attach(self, device: torch.device) -> Table:
        """Choose the shelf for the part as it is now. Graphs of an earlier load stay while it has the same identity."""
        token, shelf = self._token(device), self._shelf(device)
        known = self._tables.get(token)
        if known is None or known.shelf is None or shelf is None or known.shelf.identity != shelf.identity:
            self._tables[token] = Table(shelf)
        self._failed.clear()
        self.trial = None
        return self.table_on(device)

    def eager(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def place(self) -> dict[str, Any]:
        """Return what a load sets, with which ``vars`` of the state are updated if it fails."""
        return {name: value for name, value in vars(self).items() if name in _SET_BY_LOADS}

    def note_scalars(self) -> None:
        """Remember plain values on the modules of a block: code around it may set them where no guard looks."""
        if self.part != self.name:
            owners = [child.__dict__ for child in self.module.modules()]
            self._scalars = [(own, n, value) for own in owners for n, value in own.items() if type(value) in _SCALARS]

    def _changed_scalar(self) -> str:
        for own, name, value in self._scalars:
            now = own.get(name)
            if now is not value and (type(now) is not type(value) or now != value):
                return name
        return ""

    def start_listing(self) -> None:
        self.touched, self.unstored = {}, {}

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.options.policy == "off":
            return self.eager(*args, **kwargs) if self.capture is None else self.capture(self, args, kwargs)
        guarded = id(self) in GENERATING.parts
        if self.part != self.name:
            if not guarded and not self.holders:  # its pipeline is gone: nothing looks at it any more
                return self.eager(*args, **kwargs)
            if guarded and (changed := self._changed_scalar()):
                signature = describe_call(args, kwargs).signature
                return self._run_eager(args, kwargs, f"{changed} was set within the generation", signature)
        if not guarded and self.options.guard is not None:
            self.options.guard(self.name)
        if not guarded and self.options.watch is not None:
            self.options.watch.calling(self)
        # A mode such as the one that logs noise would see each look at each weight.
        with torch._C.DisableTorchFunction():
            found = self._find(args, kwargs)
        if found is None:
            return self._without_graph(args, kwargs, guarded)
        slot, call, _ = found
        if slot.refusal:
            return self._run_eager(args, kwargs, f"it cannot be frozen: {slot.refusal}", slot.kept.signature, slot)
        self._refuse_gradients(call)
        if self.trial is not None:
            self._try(slot, call, args, kwargs)
        else:
            self._check_casts(found, args, kwargs)
        return self._run(slot, call, args, kwargs)

    def open(self, slot: Slot) -> FrozenGraph:
        """The graph of ``slot``, bound to the part. Raises what makes it unusable: :data:`UNUSABLE`."""
        if slot.graph is not None:
            return slot.graph
        kept, timed = slot.kept, self.options.timed
        assert kept.document is not None
        assert kept.files is not None
        with _OPENING:
            known = next((graph for graph in kept.opened if graph.device == self._device), None)
        if known is not None and not known.is_baked:
            graph = known.twin(self.name)
        else:
            with timed("verify"):
                files = kept.files()
            with files, timed("open"):
                graph = FrozenGraph(kept.document, files, device=self._device, part=self.name)
        with timed("bind"):
            graph.bind(self.module)
        with _OPENING:
            kept.opened.add(graph)
        slot.graph = graph
        return graph

    def _find(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Found | None:
        table = self.table
        slot, call = table.find(self.module, args, kwargs)
        if slot is not None and self._is_usable(table, slot):
            return slot, call, ()
        table = self.table_on(call.device)
        for attempt in range(2):
            slot, call = table.find(self.module, args, kwargs)
            if slot is None and call.opaque:
                return None
            cast = table.find_cast(self.module, args, kwargs) if slot is None else None
            if cast is not None and self._is_usable(table, cast[0]):
                return cast
            if slot is not None and self._is_usable(table, slot):
                return slot, call, ()
            if not attempt:
                table.read_shelf()
        return None

    def _is_usable(self, table: Table, slot: Slot) -> bool:
        if slot.refusal:
            return True
        if slot.graph is not None:
            return slot.graph.holds or slot.graph.fits(self.module) or self._same_table(table)
        try:
            self.open(slot)
        except ChangedPartError:
            if self._same_table(table):
                raise
            return False
        except UNUSABLE as error:
            logger.warning("a graph of %s cannot be used: %s", self.name, error)
            self.unstored[slot.kept.signature.without_fixed] = str(error)
            table.remove(slot)
            return False
        return True

    def _same_table(self, table: Table) -> bool:
        """If the weights are those of the table, a graph that does not fit is an error of its own."""
        return self.table_on(self._device) is table

    def table_on(self, device: torch.device | None) -> Table:
        """Choose the graphs for calls on ``device``, by default that of the part, and the dtypes that the weights have
        now: pipelines cast parts for the length of a call.
        """
        device = device or part_device(self.module)
        token = self._token(device)
        if token not in self._tables:
            self._tables[token] = Table(self._shelf(device))
        self._device, self._table = device, self._tables[token]
        return self._table

    def _shelf(self, device: torch.device) -> Shelf | None:
        return self.options.shelf(self.name, self.module, device) if self.options.shelf else None

    def _token(self, device: torch.device) -> tuple[Any, ...]:
        return self.options.context, device.type, tuple(p.dtype for p in self.module.parameters())

    def _run(self, slot: Slot, call: DescribedCall, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        graph = self.open(slot)
        with torch._C.DisableTorchFunction():
            result = graph(self.module, call.leaves, verify=self._verify)
            for name, value in result["arguments"].items():
                write_back(args[int(name)] if name.isdigit() else kwargs[name], value)
            for path, value in result["state"].items():
                write_state(self.module, path, value)
        if result["state"]:
            self.note_scalars()
        self.uses["frozen"] += 1
        self.touched[slot.kept.key] = slot
        self.ran[slot.kept.key] = graph.document.library
        self.unstored.pop(slot.kept.signature.without_fixed, None)
        if self.observer is not None:
            self.observer(self.name, call.tensors, result["output"])
        return result["output"]

    def _run_eager(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        why: str,
        signature: CallSignature,
        slot: Slot | None = None,
    ) -> Any:
        if signature not in self._told:
            self._told.add(signature)
            logger.warning("%s runs eagerly for %s: %s", self.name, signature, why)
        self.uses["eager"] += 1
        if slot is not None:
            self.touched[slot.kept.key] = slot
        else:
            self.unstored[signature] = why
        output = self.eager(*args, **kwargs)
        if self.observer is not None:
            self.observer(self.name, describe_call(args, kwargs).tensors, output)
        return output

    def _without_graph(self, args: Sequence[Any], kwargs: Mapping[str, Any], guarded: bool) -> Any:
        call = describe_call(args, kwargs)
        signature, policy = call.signature, self.options.policy
        if call.opaque:
            return self._run_eager(args, kwargs, call.opaque, signature)
        if failed := self._failed.get(signature):
            return self._run_eager(args, kwargs, failed, signature)
        if self.options.guard is not None and not guarded and policy != "eager":
            return self._run_eager(args, kwargs, "it has no graph, and no loaded pipeline makes the call", signature)
        if policy == "compile":
            return self._freeze(args, kwargs)
        if policy == "eager":
            return self._run_eager(args, kwargs, "it has no graph (on_unfrozen is 'eager')", signature)
        if policy == "background":
            assert self.options.background is not None
            why, is_final = self.options.background(self, args, kwargs)
            if is_final:
                self._failed[signature] = why
            return self._run_eager(args, kwargs, why, signature)
        refused = self.unstored.get(signature)
        unusable = f"\n  A graph that fits cannot be used: {refused.rstrip('.')}." if refused else ""
        frozen = tuple(str(slot.kept.signature) for slot in self.graphs)
        listing = "".join(f"\n  Frozen: {known}." for known in frozen[:8])
        more = f"\n  And {len(frozen) - 8} more." if len(frozen) > 8 else ""
        raise UnfrozenCallError(
            f"{self.name} was called with a signature that no frozen graph has.\n  Called: {signature}.{unusable}"
            f"{listing}{more}\n"
            f"{self.options.freeze_hint}, or set on_unfrozen='eager' to run such calls uncompiled.",
            self.name,
            str(signature),
            frozen,
        )

    def _freeze(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Freeze the call, and run the graph for this very call: its bits are those of every later one."""
        call = describe_call(args, kwargs)
        self._refuse_gradients(call)
        signature = call.signature
        try:
            with FREEZING, without_modes():
                there = self._find(args, kwargs)  # another thread may have frozen the call meanwhile
                slot = self._with_settings(self.freeze, args, kwargs) if there is None else there[0]
        except (InterruptedBuildError, NotFiniteError) as error:
            if GENERATING.rehearsing:
                raise
            self._failed[signature] = str(error)
            return self._run_eager(args, kwargs, str(error), signature)
        if slot.refusal:
            return self._run_eager(args, kwargs, f"it cannot be frozen: {slot.refusal}", signature, slot)
        found = self._find(args, kwargs)
        if found is None or found[0].refusal:
            raise CannotFreezeError(
                f"{self.name} was frozen for {slot.kept.signature}, and the same call does not find the graph.",
                self.name,
            )
        self._check_casts(found, args, kwargs)
        return self._run(found[0], found[1], args, kwargs)

    def begin_ahead(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        others: Sequence[SizedCall] = (),
        seen: PlainCall | None = None,
    ) -> PendingBuild | None:
        """Begin to freeze a call that the pipeline will make, for the whole range of sizes with ``others``; ``None`` if
        there is a graph, or can be none yet. ``seen``: the call, when it was made. Raises :class:`CannotFreezeError`.
        """
        with FREEZING, without_modes(), torch.no_grad():
            there = self._find(args, kwargs)
            if there is not None and all(there[0].kept.signature.covers(other.call.signature) for other in others):
                return None
            try:
                begun = self._with_settings(partial(self._begin, ahead=True, seen=seen), args, kwargs, others)
            except StatefulPartError:
                return None
            return begun if isinstance(begun, PendingBuild) else None

    def run_eagerly_ahead(self, pending: PendingBuild) -> bool:
        """Run eager code once that the graph will be compared with; ``False`` when nothing is left to run."""
        with FREEZING, without_modes(), torch.no_grad():
            for run in pending.prepared.references:
                if not run.is_done:
                    self._with_settings(getattr, run, "result")
                    return True
        return False

    def end_ahead(self, pending: PendingBuild, build: Callable[[], BuiltGraph]) -> Slot:
        """Freeze what was begun, with the graph that ``build`` returns. Raises :class:`CannotFreezeError`."""
        with FREEZING, without_modes(), torch.no_grad():
            return self._with_settings(self._end, pending, build)

    def _with_settings(self, freeze: Callable[..., Begun], *arguments: Any) -> Begun:
        settings = self.options.settings
        return freeze(*arguments) if settings is None else settings.copy().run(freeze, *arguments)

    def freeze(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Slot:
        """Make a graph for the call, or note why there can be none."""
        begun = self._begin(args, kwargs)
        if isinstance(begun, Slot):
            return begun
        begun.compiled_s = time.perf_counter()
        self.options.report(self.name, "compile", None, str(begun.signature))
        return self._end(begun, lambda: begun.build.run(begun.folder))

    def _begin(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        others: Sequence[SizedCall] = (),
        *,
        ahead: bool = False,
        seen: PlainCall | None = None,
    ) -> Slot | PendingBuild:
        """Do what comes before compiling; return the slot where that is not needed, or cannot be done.

        For a range, with ``others``, :class:`CannotFreezeError` is raised instead. ``ahead``: the pipeline does not
        make the call just now, so that the state of a part is another one; that raises :class:`StatefulPartError`.
        """
        call = describe_call(args, kwargs)
        table, signature, cls = self.table_on(call.device), call.signature, type(self.module)
        identity = table.shelf.identity if table.shelf else f"{cls.__module__}.{cls.__qualname__}"
        subject = Subject(self.name, identity, self.module, self.eager, self._device, table.state_paths)
        refuse_training(self.name, self.module)
        if any(hasattr(type(child), "_pipevault_original_class") for child in self.module.modules()):
            raise InterruptedBuildError(
                f"{self.name} cannot be frozen now: its blocks are frozen for another pipeline that shares it. Unload "
                "that one, or load both with the same regions.",
                self.name,
            )
        report = self.options.report
        # A load has told that it freezes; a call that takes minutes must tell of itself.
        logger.log(
            logging.INFO if GENERATING.rehearsing else logging.WARNING, "freezing %s for %s", self.name, signature
        )
        started_s = time.perf_counter()
        try:
            report(self.name, "capture", None, str(signature))
            observation = observe_call(subject, args, kwargs, seen)
            signature = observation.signature
            report(self.name, "capture", time.perf_counter() - started_s, str(signature))
            if ahead and signature.state:
                raise StatefulPartError("it keeps state between its calls", self.name)
            if others:
                signature = range_signature(signature, observation.call.leaves, others)
            same = [slot for slot in table if slot.kept.signature.without_fixed == signature.without_fixed]
            if signature.fixed and len(same) >= MAX_VALUES:
                raise CannotFreezeError(
                    f"{MAX_VALUES} of its graphs differ only in numbers that steer it, so they vary with every call",
                    self.name,
                )
            with ExitStack() as stack:
                if table.shelf is None:
                    folder = kept_scratch_folder()
                else:
                    stack.enter_context(table.shelf.freezing(signature))
                    if (made := self._made_meanwhile(table, observation.signature, others)) is not None:
                        return made
                    folder = stack.enter_context(scratch_folder("graphs"))
                prepared = prepare_call(subject, observation, options=self.options.build, others=others)
                return PendingBuild(prepared, table, signature, folder, started_s, stack.pop_all())
        except CannotFreezeError as error:
            return self._refused(table, signature, error, others)

    def _end(self, pending: PendingBuild, build: Callable[[], BuiltGraph]) -> Slot:
        prepared, table, report = pending.prepared, pending.table, self.options.report
        signature = str(pending.signature)
        with pending.held:
            try:
                built = build()
                report(self.name, "check", None, signature)
                frozen = finish_call(prepared, built, verify=self._verify)
            except CannotFreezeError as error:
                return self._refused(table, pending.signature, error, prepared.others)
            report(self.name, "compile", time.perf_counter() - pending.compiled_s, signature)
            if table.shelf is None:
                return table.add(_in_memory(frozen))
            return table.add(table.shelf.keep(frozen, time.perf_counter() - pending.started_s))

    def _made_meanwhile(self, table: Table, wanted: CallSignature, others: Sequence[SizedCall]) -> Slot | None:
        """Return what another process put on the shelf until this one held its lock."""
        known = {slot.kept.key for slot in table}
        table.read_shelf()
        for slot in table:
            theirs = slot.kept.signature
            if others:
                fits = all(theirs.covers(one) for one in (wanted, *(other.call.signature for other in others)))
            else:
                fits = theirs == wanted
            if slot.kept.key in known or not fits or not slot.constants_fit(self.module):
                continue
            if self._is_usable(table, slot):
                return slot
        return None

    def _refused(
        self, table: Table, signature: CallSignature, error: CannotFreezeError, others: Sequence[SizedCall]
    ) -> Slot:
        """Note why a call cannot be frozen; ``error`` is raised where it does not depend on the call."""
        of_the_moment = (TrainingModeError, CompilerMissingError, InterruptedBuildError, NotFiniteError)
        if others or isinstance(error, (*of_the_moment, StatefulPartError)):
            raise error
        reason = str(error)
        logger.info("%s cannot be frozen for %s: %s", self.name, signature, reason)
        if table.shelf is not None:
            return table.add(table.shelf.refuse(signature.without_fixed, reason))
        return table.add(ShelfItem(signature.without_fixed, signature.digest.hex, refusal=reason))

    def _refuse_gradients(self, call: DescribedCall) -> None:
        if not torch.is_grad_enabled():
            return
        asked = any(tensor.requires_grad for tensor in call.tensors)
        if asked or any(parameter.requires_grad for parameter in self.module.parameters()):
            what = "on tensors that need" if asked else "with weights that ask for"
            raise CannotFreezeError(
                f"{self.name} was called {what} gradients, which a frozen graph does not compute. "
                f"Call it under torch.no_grad(), call {self.name}.requires_grad_(False), or load the pipeline in mode "
                "'off' to train.",
                self.name,
            )

    def _try(self, slot: Slot, call: DescribedCall, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Compare a part that changed with its graph, once: whether the change matters is shown, not guessed."""
        trial, what = self.trial, ""
        assert trial is not None
        try:
            self._compare(slot, call, args, kwargs, "it was changed")
        except ChangedPartError as error:
            what = str(error)
        self.trial = None
        trial(what)

    def _check_casts(self, found: Found, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        slot, call, casts = found
        if casts and casts not in slot.casts:
            self._compare(slot, call, args, kwargs, "its inputs are cast to the dtypes that were frozen")
            slot.casts.add(casts)

    def _compare(
        self, slot: Slot, call: DescribedCall, args: Sequence[Any], kwargs: Mapping[str, Any], why: str
    ) -> None:
        graph = self.open(slot)
        with without_modes(), torch.no_grad():
            attributes = Attributes(self.module)
            held_args, held_kwargs = copied((tuple(args), dict(kwargs)))
            expected = self.eager(*held_args, **held_kwargs)
            attributes.restore(tuple(attributes.written()))
            actual = graph(self.module, copied_leaves(call.leaves), verify=self._verify)["output"]
        comparison = compare_trees(expected, actual, same_non_finite=True)
        if not comparison.passed:
            raise ChangedPartError(
                f"{self.name} no longer computes what its graph does ({why}): {comparison.failure}", self.name
            )

    def _verify(self, module: nn.Module) -> str:
        return self.options.verify(self.table.shelf, module) if self.options.verify else ""

    def save(self, path: Path) -> None:
        """Write the part's document to ``path`` and its files next to it. Raises if there is nothing to save."""
        graphs = self.graphs
        if not graphs:
            raise NothingFrozenError(f"{self.name} has no graphs, so there is nothing to save.", self.name)
        identity = self.options.watch.saving(self) if self.options.watch is not None else None
        artifacts = path.parent / ARTIFACTS
        artifacts.mkdir(parents=True, exist_ok=True)
        for slot in graphs:
            document = slot.kept.document
            assert document is not None
            assert slot.kept.files is not None
            with slot.kept.files() as files:
                for name, digest in document.files.items():
                    if not (artifacts / digest).exists():
                        shutil.copyfile(files[name].path, artifacts / digest)
        write_part(path, [slot.kept.document for slot in graphs if slot.kept.document], identity)

    def load(self, path: Path) -> None:
        """Add the graphs of a document; a call that none of them fits is an error from now on."""
        graphs, identity = read_part(path)
        if self.options.watch is not None:
            self.options.watch.loading(self, identity, path)
        table = self.table
        for document in graphs:
            files = partial(_files_beside, path, document)
            self.open(table.add(ShelfItem(document.signature, document.signature.digest.hex, document, files)))
        self.options = replace(self.options, policy="error")


def _in_memory(frozen: FrozenCall) -> ShelfItem:
    signature = frozen.document.signature
    key = digest_json({"signature": signature.to_json(), "origins": frozen.document.origins}).hex
    return ShelfItem(signature, key, frozen.document, frozen.open, times=frozen.times)


def _files_beside(path: Path, document: GraphDocument) -> GraphFiles:
    folder = path.parent / ARTIFACTS
    return document.open_files(
        lambda name, digest: open_verified(folder / digest, Digest(digest), what=f"The file {name} of {path}")
    )
