"""A part of a pipeline that runs frozen graphs and is still an instance of its own class.

Pipelines test ``isinstance(controlnet, ControlNetModel)``, so a part is not wrapped: it becomes an object of a class
made from (:class:`FrozenPart`, original class) that shares the original's ``__dict__``. Attributes, hooks, ``.to()``
and ``.config`` work without being forwarded. It is a OneDiff ``DeployableModule``: onediffx's ``compile_pipe``,
``save_pipe`` and ``load_pipe`` drive it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from onediff.infer_compiler import DeployableModule
from torch import nn
from torch.utils import _pytree as pytree

from pipevault.digest import Digest, digest_file
from pipevault.errors import (
    CannotFreezeError,
    CorruptEntryError,
    NothingFrozenError,
    TrainingModeError,
    UnfrozenCallError,
)
from pipevault.graphs.check import Comparison, compare_trees, worst_of
from pipevault.graphs.document import ARTIFACTS, read_part, write_part
from pipevault.graphs.frozen import (
    BAKED,
    FrozenGraph,
    GraphDocument,
    iter_devices,
    layout_digest,
    read_constants,
)
from pipevault.graphs.inductor import BuildOptions, BuiltGraph, build_digest, build_graph
from pipevault.graphs.signature import Signature, UnsupportedArgumentError, describe_call, sorted_kwargs

ReusableGraph = tuple[GraphDocument, Path, Path | None]

STATE = "_pipevault"
MAX_GRAPHS = 16


@dataclass(frozen=True)
class PartOptions:
    """The ``options`` of ``compile_pipe(pipe, backend="inductor", options=…)``.

    ``mode``: ``compile`` (a call that fits no graph is compiled on the spot, as OneDiff's backends do), ``capture``
    (calls run eagerly and are recorded), ``frozen`` (a call that fits no graph follows ``on_unfrozen``: ``error`` or
    ``eager``) or ``eager``. ``artifact_path`` finds a file by its SHA-256; by default it lies beside the document.
    """

    mode: str = "compile"
    on_unfrozen: str = "error"
    build: BuildOptions = field(default_factory=BuildOptions)
    artifact_path: Callable[[str], Path] | None = None
    freeze_hint: str = "Load the pipeline with these sizes in mode 'compile'"


@dataclass
class CapturedCall:
    """One eager call: copies of its arguments from before, and of its output from after."""

    signature: Signature
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class FrozenPart(DeployableModule):  # type: ignore[misc]
    """Mix-in of every class that :func:`freeze_class` makes."""

    _pipevault_original_class: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return part_state(self).call(args, kwargs)

    @property
    def _deployable_module_dpl_graph(self) -> PartState:
        return part_state(self)

    def get_graph(self) -> PartState:
        return part_state(self)

    def save_graph(self, file_path: str | Path) -> None:
        part_state(self).save(Path(file_path))

    def load_graph(self, file_path: str | Path, device: Any = None, run_warmup: bool = True) -> None:
        part_state(self).load(Path(file_path))

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """A copy is eager: its weights are others than those that the graphs are bound to."""
        original = self._pipevault_original_class
        copied = memo[id(self)] = original.__new__(original)
        copied.__dict__ = deepcopy(tracing_view(part_state(self).module).__dict__, memo)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickled part comes back eager, for the same reason."""
        return _restore, (self._pipevault_original_class, tracing_view(part_state(self).module).__dict__)


class PartState:
    """What a frozen part knows beside the module that it shares: its graphs, its mode, what it captured."""

    def __init__(self, module: nn.Module, options: PartOptions) -> None:
        self.module = module
        self.name = type(module).__name__
        self.identity = f"{type(module).__module__}.{type(module).__qualname__}"
        self.options = options
        self.graphs: dict[Signature, FrozenGraph] = {}
        self.files: dict[Signature, tuple[Path, Path | None]] = {}
        self.calls: list[CapturedCall] = []
        self.refusal = ""
        self.hooked_forward: Callable[..., Any] | None = None
        self._overrides = _overrides(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A state belongs to one module: whoever copies that module's ``__dict__`` gets none."""

    def __reduce__(self) -> Any:
        return type(None), ()

    @property
    def is_compiled(self) -> bool:
        """Read by ``save_pipe``: whether there is anything to save."""
        return bool(self.graphs)

    def set_mode(self, mode: str) -> None:
        self.options = replace(self.options, mode=mode)

    def eager(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mode = self.options.mode
        if mode == "eager":
            return self.eager(*args, **kwargs)
        kwargs = sorted_kwargs({**kwargs, **self._overrides})
        if mode == "capture":
            return self._capture(args, kwargs)
        try:
            signature, tensors = describe_call(args, kwargs)
        except UnsupportedArgumentError as error:
            return self._unfrozen(str(error), args, kwargs)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise CannotFreezeError(
                f"{self.name} was called on tensors that need gradients, which a frozen graph does not compute. "
                "Call it under torch.no_grad(), or load the pipeline in mode 'off' to train.",
                self.name,
            )
        graph = self.graphs.get(signature)
        if graph is None:
            if mode != "compile":
                return self._unfrozen(str(signature), args, kwargs)
            output = self._capture(args, kwargs)
            if self.refusal:
                raise CannotFreezeError(f"{self.name} cannot be frozen: {self.refusal}.", self.name)
            self.compile_captured(_scratch_dir())
            return output
        return graph(self.module, tensors)

    def _unfrozen(self, signature: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.options.on_unfrozen == "eager":
            return self.eager(*args, **kwargs)
        frozen = tuple(str(known) for known in self.graphs)
        listing = "".join(f"\n  frozen: {known}" for known in frozen)
        raise UnfrozenCallError(
            f"{self.name} was called with a signature that no frozen graph has.\n  called: {signature}{listing}\n"
            f"{self.options.freeze_hint}, or set on_unfrozen='eager' to run such calls uncompiled.",
            self.name,
            signature,
            frozen,
        )

    def _capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.refusal:
            return self.eager(*args, **kwargs)
        try:
            signature, tensors = describe_call(args, kwargs)
        except UnsupportedArgumentError as error:
            self._refuse(str(error))
            return self.eager(*args, **kwargs)
        versions = [_version(tensor) for tensor in tensors]
        copied_args, copied_kwargs = _copy_tensors((args, kwargs))
        output = self.eager(*args, **kwargs)
        try:
            after, tensors_after = describe_call(args, kwargs)
        except UnsupportedArgumentError as error:
            self._refuse(f"it changes its arguments: afterwards {error}")
            return output
        if after != signature or any(a is not b for a, b in zip(tensors, tensors_after, strict=True)):
            self._refuse("it changes a container among its arguments")
        elif [_version(tensor) for tensor in tensors] != versions:
            self._refuse("it changes a tensor among its arguments in place")
        else:
            self.calls.append(CapturedCall(signature, copied_args, copied_kwargs, _copy_tensors(output)))
            if len({call.signature for call in self.calls}) > MAX_GRAPHS:
                self._refuse(f"it was called with more than {MAX_GRAPHS} signatures, so its arguments vary in value")
        return output

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        self.calls.clear()

    def signatures(self) -> tuple[Signature, ...]:
        """Captured signatures in the order of their first call."""
        return tuple(dict.fromkeys(call.signature for call in self.calls))

    def compile_captured(
        self,
        output_dir: Path,
        *,
        on_step: Callable[[str, str], None] = lambda action, detail: None,
        reuse: Callable[[str], ReusableGraph | None] = lambda build: None,
    ) -> None:
        """Compile every captured signature, then check each graph on every captured call, in order.

        ``reuse`` may give a graph that was built before under the same build digest; it is checked all the same.
        Raises :class:`CannotFreezeError`, and keeps no graph, if a call cannot be compiled or a check fails.
        """
        module = tracing_view(self.module)
        if training := [name or type(m).__name__ for name, m in module.named_modules() if m.training]:
            raise TrainingModeError(
                f"{self.name} is in training mode ({training[0]}), which would freeze its dropout. "
                "Call pipe.<part>.eval() on it first.",
                self.name,
            )
        if any(device.type == "meta" for device in iter_devices(module)):
            raise CannotFreezeError("its weights are offloaded to the meta device", self.name)
        graphs: dict[Signature, FrozenGraph] = {}
        files: dict[Signature, tuple[Path, Path | None]] = {}
        for number, signature in enumerate(s for s in self.signatures() if s not in self.graphs):
            calls = [call for call in self.calls if call.signature == signature]
            on_step("compile", str(signature))
            build = build_digest(self.identity, signature, self.options.build)
            known = reuse(build.hex)
            if known:
                document, package, constants = known
            else:
                built = build_graph(
                    module,
                    calls[0].args,
                    calls[0].kwargs,
                    calls[0].output,
                    build=build,
                    options=self.options.build,
                    output_dir=output_dir / f"{self.name}.{number}",
                )
                document, package, constants = (
                    self._document(calls[0], build, built),
                    built.package,
                    built.constants,
                )
            graph = self._open(document, package, constants)
            on_step("check", str(signature))
            graph.document = replace(document, checks=self._check(graph, calls))
            graphs[signature], files[signature] = graph, (package, constants)
        self.graphs.update(graphs)
        self.files.update(files)
        self.calls.clear()

    def _document(self, call: CapturedCall, build: Digest, built: BuiltGraph) -> GraphDocument:
        _, tensors = describe_call(call.args, call.kwargs)
        lifted = tuple(read_constants(built.constants))
        baked = self.options.build.weights == "baked"
        return GraphDocument(
            signature=call.signature,
            build=build.hex,
            package=digest_file(built.package).hex,
            constants=digest_file(built.constants).hex if built.constants else None,
            strides=tuple(tuple(tensor.stride()) for tensor in tensors),
            outputs=built.outputs,
            output_tree=built.output_tree,
            ties=built.ties,
            layout=BAKED if baked else layout_digest(self.module, built.package, lifted),
            checks={},
        )

    def _open(self, document: GraphDocument, package: Path, constants: Path | None) -> FrozenGraph:
        graph = FrozenGraph(
            document,
            package,
            device=next(iter_devices(self.module), torch.device("cpu")),
            lifted=read_constants(constants),
            part=self.name,
        )
        graph.bind(self.module)
        return graph

    def _check(self, graph: FrozenGraph, calls: list[CapturedCall]) -> Mapping[str, Any]:
        results: list[Comparison] = []
        for number, call in enumerate(calls, start=1):
            _, tensors = describe_call(call.args, call.kwargs)
            result = compare_trees(call.output, graph(self.module, tensors))
            if not result.passed:
                raise CannotFreezeError(f"call {number} of {len(calls)}: {result.failure}", self.name)
            results.append(result)
        worst = worst_of(results)
        return {"calls": len(calls), "distance": worst.distance, "tolerance": worst.tolerance}

    def save(self, path: Path) -> None:
        """Write the part's document to ``path`` and its files beside it. Raises if there is nothing to save."""
        if not self.graphs:
            raise NothingFrozenError(f"{self.name} has no graphs, so there is nothing to save.", self.name)
        artifacts = path.parent / ARTIFACTS
        artifacts.mkdir(parents=True, exist_ok=True)
        for signature, graph in self.graphs.items():
            package, constants = self.files[signature]
            for digest, source in ((graph.document.package, package), (graph.document.constants, constants)):
                if digest and source and not (artifacts / digest).exists():
                    shutil.copyfile(source, artifacts / digest)
        write_part(path, [graph.document for graph in self.graphs.values()])

    def load(self, path: Path) -> None:
        """Add the graphs of a document and freeze the part. Graphs of other signatures stay."""
        find = self.options.artifact_path or _beside(path)
        for document in read_part(path):
            package = find(document.package)
            constants = find(document.constants) if document.constants else None
            self.graphs[document.signature] = self._open(document, package, constants)
            self.files[document.signature] = (package, constants)
        self.set_mode("frozen")

    def discard_graphs(self) -> None:
        self.graphs.clear()
        self.files.clear()
        self.calls.clear()


@cache
def freeze_class(original: Any) -> type[nn.Module]:
    """The class made from (:class:`FrozenPart`, ``original``). It bears the original's name, so that
    ``save_pretrained`` writes what it always wrote.
    """
    return type(
        original.__name__,
        (FrozenPart, original),
        {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "_pipevault_original_class": original,
        },
    )


def freeze_module(module: nn.Module, options: PartOptions) -> nn.Module:
    """``module`` as a frozen part that shares its ``__dict__``."""
    if isinstance(module, FrozenPart):
        part_state(module).options = options
        return module
    cls = freeze_class(type(module))  # type: ignore[arg-type]
    part = cls.__new__(cls)
    state = PartState(module, options)
    part.__dict__ = module.__dict__
    part.__dict__[STATE] = state
    if "forward" in part.__dict__ and "_old_forward" in part.__dict__:
        # accelerate's hooks replace the instance's forward and call the one they found; it must be the frozen one.
        state.hooked_forward = part.__dict__["_old_forward"]
        part.__dict__["_old_forward"] = cls.forward.__get__(part)
    elif "forward" in part.__dict__:
        del part.__dict__[STATE]
        raise CannotFreezeError(
            f"{type(module).__name__}.forward was replaced on the instance, so its graphs would never run. "
            "Undo the patch, or leave the part out.",
            type(module).__name__,
        )
    return part


def unfrozen(module: nn.Module) -> nn.Module:
    """The eager module behind a frozen part; other modules come back as they are."""
    if not isinstance(module, FrozenPart):
        return module
    state = part_state(module)
    if state.hooked_forward is not None:
        module.__dict__["_old_forward"] = state.hooked_forward
    module.__dict__.pop(STATE, None)
    return state.module


def part_state(module: nn.Module) -> PartState:
    return cast(PartState, module.__dict__[STATE])


def tracing_view(module: nn.Module) -> nn.Module:
    """The module without hooks of its own, for tracing: they run around the graph, not inside it."""
    view = type(module).__new__(type(module))
    view.__dict__ = {k: v for k, v in module.__dict__.items() if k not in {STATE, "forward", "_old_forward"}}
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        view.__dict__[hooks] = type(module.__dict__[hooks])()
    return view


def _restore(original: type[nn.Module], attributes: dict[str, Any]) -> nn.Module:
    module = original.__new__(original)
    module.__dict__ = attributes
    return module


def _overrides(module: nn.Module) -> dict[str, Any]:
    """A language model as text encoder returns a key-value cache, which no graph can return and no pipeline reads."""
    return {"use_cache": False} if getattr(getattr(module, "config", None), "use_cache", False) else {}


def _copy_tensors(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, tree)


def _version(tensor: torch.Tensor) -> int:
    """Inference tensors count no versions; a change to them in place shows in the whole-pipeline check."""
    return 0 if tensor.is_inference() else tensor._version


def _beside(path: Path) -> Callable[[str], Path]:
    def find(digest: str) -> Path:
        artifact = path.parent / ARTIFACTS / digest
        try:
            actual = digest_file(artifact).hex
        except OSError as error:
            raise CorruptEntryError(
                f"{artifact}, which {path.name} needs, cannot be read: {error}. Save the part again.",
                artifact,
            ) from error
        if actual != digest:
            raise CorruptEntryError(f"{artifact} is not what {path.name} names. Save the part again.", artifact)
        return artifact

    return find


def _scratch_dir() -> Path:
    import atexit
    import tempfile

    folder = tempfile.mkdtemp(prefix="pipevault-graphs-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
