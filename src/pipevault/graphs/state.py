"""What a frozen part knows beside the module that it shares: its mode, its graphs, what it captured."""

from __future__ import annotations

import atexit
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipevault.digest import Digest, digest_file
from pipevault.errors import (
    CannotFreezeError,
    CorruptEntryError,
    NothingFrozenError,
    TrainingModeError,
    UnfrozenCallError,
)
from pipevault.graphs.capture import CapturedCall, Recorder
from pipevault.graphs.check import Comparison, compare_trees, worst_of
from pipevault.graphs.document import ARTIFACTS, read_part, write_part
from pipevault.graphs.frozen import (
    BAKED,
    FrozenGraph,
    GraphDocument,
    iter_devices,
    layout_digest,
    package_metadata,
    read_constants,
)
from pipevault.graphs.inductor import BuildOptions, BuiltGraph, build_digest, build_graph
from pipevault.graphs.scratch import scratch_folder
from pipevault.graphs.signature import Signature, UnsupportedArgumentError, describe_call, sorted_kwargs

ReusableGraph = tuple[GraphDocument, Path, Path | None]


@dataclass(frozen=True)
class PartOptions:
    """The ``options`` of ``compile_pipe(pipe, backend="inductor", options=…)``.

    ``mode``: ``compile`` (a call that fits no graph is compiled on the spot, as OneDiff's backends do), ``capture``
    (calls run eagerly and are recorded), ``frozen`` (a call that fits no graph follows ``on_unfrozen``: ``error`` or
    ``eager``) or ``eager``. ``artifact_path`` finds a file by its SHA-256; by default it lies beside the document.
    ``verify`` looks at a part whose sub-modules changed and says what its graphs cannot follow, or nothing.
    """

    mode: str = "compile"
    on_unfrozen: str = "error"
    build: BuildOptions = field(default_factory=BuildOptions)
    artifact_path: Callable[[str], Path] | None = None
    verify: Callable[[str, nn.Module], str] | None = None
    freeze_hint: str = "Load the pipeline for such calls in mode 'compile'"


class PartState:
    """What a frozen part knows beside the module that it shares: its graphs, its mode, what it captured."""

    def __init__(self, module: nn.Module, options: PartOptions) -> None:
        self.module = module
        self.name = type(module).__name__
        self.identity = f"{type(module).__module__}.{type(module).__qualname__}"
        self.options = options
        self.graphs: dict[Signature, FrozenGraph] = {}
        self.files: dict[Signature, tuple[Path, Path | None]] = {}
        self.recorder = Recorder()
        self.observer: Callable[[str, list[torch.Tensor], Any], None] | None = None
        self.hooked_forward: Callable[..., Any] | None = None
        self._overrides = _overrides(module)

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
            return self.recorder.record(self.eager, args, kwargs)
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
            output = self.recorder.record(self.eager, args, kwargs)
            if self.recorder.refusal:
                raise CannotFreezeError(f"{self.name} cannot be frozen: {self.recorder.refusal}.", self.name)
            self.compile_captured(_scratch_dir())
            return output
        # A mode such as the one that logs noise would see each look at each weight.
        with torch._C.DisableTorchFunction():
            output = graph(self.module, tensors)
        if self.observer is not None:
            self.observer(self.name, tensors, output)
        return output

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
        if training := [name or type(m).__name__ for name, m in module.named_modules() if _trains(m)]:
            raise TrainingModeError(
                f"{self.name} is in training mode ({training[0]}), which would freeze its dropout. "
                "Call pipe.<part>.eval() on it first.",
                self.name,
            )
        if any(device.type == "meta" for device in iter_devices(module)):
            raise CannotFreezeError("its weights are offloaded to the meta device", self.name)
        graphs: dict[Signature, FrozenGraph] = {}
        files: dict[Signature, tuple[Path, Path | None]] = {}
        for number, signature in enumerate(s for s in self.recorder.signatures() if s not in self.graphs):
            calls = [call for call in self.recorder.calls if call.signature == signature]
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
        self.recorder.calls.clear()

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
            machine=package_metadata(built.package),
            checks={},
        )

    def _open(self, document: GraphDocument, package: Path, constants: Path | None) -> FrozenGraph:
        graph = FrozenGraph(
            document,
            package,
            device=next(iter_devices(self.module), torch.device("cpu")),
            lifted=read_constants(constants),
            part=self.name,
            verify=self._verify,
        )
        graph.bind(self.module)
        return graph

    def _verify(self, module: nn.Module) -> str:
        return self.options.verify(self.name, module) if self.options.verify else ""

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
        self.recorder.calls.clear()


def tracing_view(module: nn.Module) -> nn.Module:
    """The module without hooks of its own, for tracing: they run around the graph, not inside it."""
    view = type(module).__new__(type(module))
    view.__dict__ = {k: v for k, v in module.__dict__.items() if k not in {"forward", "_old_forward"}}
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        view.__dict__[hooks] = type(module.__dict__[hooks])()
    return view


def _trains(module: nn.Module) -> bool:
    """Whether training mode changes what the module computes. peft leaves its layers in training mode, which is
    harmless unless one of them is a dropout.
    """
    if not module.training or type(module).__module__.startswith("peft."):
        return False
    if type(module).__module__.startswith("torch.nn."):
        return getattr(module, "p", 0) > 0 or isinstance(module, (nn.modules.batchnorm._NormBase, nn.RReLU))
    return True


def _overrides(module: nn.Module) -> dict[str, Any]:
    """A language model as text encoder returns a key-value cache, which no graph can return and no pipeline reads."""
    return {"use_cache": False} if getattr(getattr(module, "config", None), "use_cache", False) else {}


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
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(scratch_folder("graphs", secrets.token_hex(16)))
