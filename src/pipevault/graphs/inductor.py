"""Compile one call of a module into a shared library by AOTInductor, whose weights stay outside.

``torch.export`` traces the call, AOTInductor compiles it. Source: https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from pipevault.compat.pytorch import TracedSizes, forget_vector_isa, one_vector_isa_probed
from pipevault.digest import Digest, digest_json
from pipevault.errors import CannotFreezeError, CompilerMissingError, InterruptedBuildError, SettingsError
from pipevault.files.scratch import scratch_folder
from pipevault.graphs.compiler_cache import Headers, trials_folder
from pipevault.graphs.library import CONSTANTS_NAME, EXTERN_NAME, LIBRARY_NAME
from pipevault.graphs.observe import iter_tensors, named_tensors
from pipevault.graphs.program import Program, Results
from pipevault.graphs.ranges import Sizes, Symbol, expression
from pipevault.graphs.signature import CallSignature
from pipevault.graphs.views import with_equal_gradients

logger = logging.getLogger("pipevault")

GRAPH_FORMAT = 4
_EMBED_KERNELS = "aot_inductor.embed_kernel_binary"
"""The kernels of a GPU become part of the library; without it they are files next to it."""
_KERNEL_SUFFIXES = frozenset({".cubin", ".fatbin", ".hsaco", ".spv"})
_CUSTOM_OBJECTS = "custom_objs_config.json"
_PREPACK = "cpp.weight_prepack"
"""On in torch: autotuned products of matrices on the CPU take a packed copy of a weight."""
FOLDS_WEIGHTS = frozenset({"freezing", "aot_inductor.use_runtime_constant_folding", _PREPACK})
"""Options that put values made of the weights into the code or next to it; other weights would not change them."""

PROFILE_OPTIONS: Mapping[str, Mapping[str, bool | int | float | str]] = {
    "fast": {"aot_inductor.compile_wrapper_opt_level": "O0"},
    "balanced": {},
    "max": {"max_autotune": True, "coordinate_descent_tuning": True},
}
"""Options of Inductor by compile profile. What is tuned is tuned once: the winners are the code of the graph.

``fast`` leaves the code that calls the kernels as it is written; with ``baked`` weights, ``max`` folds them.
"""
MAX_CANDIDATES: Sequence[Mapping[str, bool]] = (
    {"max_autotune": False, "coordinate_descent_tuning": False},
    {"conv_1x1_as_mm": True},
)
"""Options laid over those of profile ``max``, which compiles with each of them too and keeps the fastest graph."""


@dataclass(frozen=True)
class BuildOptions:
    """The options that change the generated code, and are therefore part of the key.

    ``weights``: ``bound`` or ``baked``. ``config``: overrides of ``torch._inductor.config``. ``candidates``: others in
    place of ``config``, with which each graph is compiled too; the fastest of them is kept.
    """

    weights: str = "bound"
    config: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    candidates: tuple[Mapping[str, bool | int | float | str], ...] = ()

    def __post_init__(self) -> None:
        """Raises :class:`SettingsError` for an override that the format depends on."""
        fixed = {name for name in self.config if name.startswith("aot_inductor.package") or name == _EMBED_KERNELS}
        if self.weights == "bound":
            fixed |= {name for name in FOLDS_WEIGHTS & self.config.keys() if name != _PREPACK or self.config[name]}
        if fixed:
            raise SettingsError(
                f"build_config cannot override {', '.join(sorted(fixed))}: graphs take live weights from "
                "outside. Leave it out, or use weights='baked' to let weights be folded."
            )

    @classmethod
    def of_profile(cls, profile: str, weights: str, config: Mapping[str, bool | int | float | str]) -> BuildOptions:
        """Return the options of a compile profile, with those of ``config`` over them."""
        folding = {"freezing": True} if (profile, weights) == ("max", "baked") else {}
        first = {**PROFILE_OPTIONS[profile], **folding}
        configs = [{**first, **other, **config} for other in ({}, *(MAX_CANDIDATES if profile == "max" else ()))]
        if weights == "bound" and any(one.get("max_autotune") or one.get("max_autotune_gemm") for one in configs):
            # Off anyway, see _compile; here it is part of the key, so that no graph from before that is taken.
            configs = [{_PREPACK: False, **one} for one in configs]
        return cls(weights, configs[0], tuple(c for i, c in enumerate(configs) if c not in configs[:i])[1:])

    @property
    def digest(self) -> str:
        """The hex SHA-256 that stands for the options in a record: of their overrides and candidates."""
        if not self.candidates:
            return digest_json(dict(self.config)).hex
        return digest_json([dict(one) for one in (self.config, *self.candidates)]).hex

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> BuildOptions:
        """Return the options that :meth:`to_json` wrote. Raises ``KeyError`` or ``TypeError`` for anything else."""
        return cls(document["weights"], dict(document["config"]), tuple(map(dict, document.get("candidates", ()))))

    def to_json(self) -> dict[str, Any]:
        candidates = {"candidates": [dict(one) for one in self.candidates]} if self.candidates else {}
        return {"weights": self.weights, "config": dict(self.config), **candidates, "graph_format": GRAPH_FORMAT}


@dataclass(frozen=True)
class BuiltGraph:
    """The files of a compiled graph and what is needed to bind it.

    ``beside`` are files that the library looks up in its folder. ``ties`` are groups of names that shared one storage
    when the graph was made. ``origins`` has the steps to each constant that is an attribute of a module (see
    :func:`~pipevault.graphs.observe.iter_tensors`).
    """

    library: Path
    beside: Mapping[str, Path]
    machine: Mapping[str, str]
    constants: Path | None = None
    ties: tuple[tuple[str, ...], ...] = ()
    origins: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)
    candidates: tuple[BuiltGraph, ...] = ()
    """Graphs of that call too, compiled with other options."""
    sizes: Sizes | None = None
    """The conditions of a graph for a range on the sizes of its inputs, in their order."""


Varying: TypeAlias = "Mapping[tuple[int, int], Symbol]"
"""The sizes that vary in a graph for a range: by index of the input and of its dimension."""


@dataclass(frozen=True)
class Build:
    """The compilation of one graph: ``program`` on ``module`` for ``leaves``, whose tensors are its inputs.

    ``digest`` is the :func:`build_digest`: it fixes the path of the build folder, which Inductor writes into the code,
    so that a second build is byte-identical. ``varying`` makes one graph for a range of sizes; numbers that are
    ``counted`` are sizes of its inputs (see :class:`~pipevault.graphs.signature.CallSignature`).
    """

    module: nn.Module
    program: Program
    leaves: Sequence[Any]
    results: Results
    digest: Digest
    options: BuildOptions
    varying: Varying
    counted: tuple[tuple[int, int, int], ...] = ()
    is_one_of_many: bool = False
    """True if there are enough of them for precompiled headers to pay."""

    def run(self, output_dir: Path) -> BuiltGraph:
        """Compile here, with each of the candidates too. One that the compiler refuses is left out."""
        configs, graphs = (self.options.config, *self.options.candidates), []
        for number, config in enumerate(configs):
            candidate = replace(self, options=replace(self.options, config=config))
            try:
                graphs.append(build_graph(candidate, output_dir / f"candidate-{number}"))
            except InterruptedBuildError:
                raise
            except CannotFreezeError as error:
                if not graphs and number == len(configs) - 1:
                    raise  # kept in no list: an error holds its frames, and they would hold the list
                logger.info("a candidate with %s cannot be compiled: %s", dict(config), error)
        return replace(graphs[0], candidates=tuple(graphs[1:]))


def build_digest(identity: str, signature: CallSignature, options: BuildOptions) -> Digest:
    """Return a digest of all that decides a graph's code: two builds with one digest give the same bytes."""
    return digest_json({"identity": identity, "signature": signature.to_json(), "options": options.to_json()})


def build_graph(build: Build, output_dir: Path) -> BuiltGraph:
    """Compile ``build`` with its own options to ``output_dir``. Raises :class:`CannotFreezeError` with the reason, and
    :class:`InterruptedBuildError` for one of the moment.
    """
    build = replace(build, module=with_equal_gradients(build.module))
    module, options, varying = build.module, build.options, build.varying
    inputs = [leaf for leaf in build.leaves if isinstance(leaf, torch.Tensor)]
    traced = _export(_as_function(build), inputs, varying)
    signature = traced.graph_signature
    if mutated := sorted({*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()}):
        raise CannotFreezeError(f"the call changes {', '.join(mutated)} in place")
    asked = _asked_sizes(TracedSizes(traced)) if varying else None
    with ExitStack() as stack:
        stack.enter_context(one_vector_isa_probed(trials_folder()))
        folder = stack.enter_context(_build_folder(build.digest))
        stack.enter_context(_inductor_caches_in(folder))
        files, constants = _compile(traced, options, make_headers=build.is_one_of_many)
        output_dir.mkdir(parents=True, exist_ok=True)
        compiled = _collect(files, output_dir)
    known = dict(named_tensors(module))
    lifted = {} if options.weights == "baked" else {k: v for k, v in constants.items() if k not in known}
    _refuse_made(lifted, traced)
    if options.weights == "bound":
        strip_symbols(compiled.library)
    return replace(
        compiled,
        constants=_write_constants(lifted, output_dir / CONSTANTS_NAME) if lifted else None,
        ties=_ties(module),
        origins=_origins(module, traced),
        sizes=_sizes(traced, varying, *asked) if asked else None,
    )


def _refuse_made(lifted: Mapping[str, torch.Tensor], traced: torch.export.ExportedProgram) -> None:
    """Refuse constants that are not the program's own: the compiler made them, of weights as far as can be told."""
    own = [value for value in (*traced.constants.values(), *traced.state_dict.values()) if torch.is_tensor(value)]
    for name, value in lifted.items():
        if not any(value.dtype == one.dtype and value.shape == one.shape and _same(value, one) for one in own):
            raise CannotFreezeError(
                f"the compiler made a constant of its own ({name}, {value.dtype}{list(value.shape)}), which other "
                "weights would not change"
            )


def _same(value: torch.Tensor, other: torch.Tensor) -> bool:
    if isinstance(other, torch._subclasses.FakeTensor):
        return False
    return _place(value) == _place(other) or torch.equal(value.cpu(), other.cpu())


def _as_function(build: Build) -> nn.Module:
    module, leaves = build.module, build.leaves
    original = type(module)

    def forward(self: nn.Module, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(inputs)
        filled: list[Any] = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        for index, leaf, dim in build.counted:
            filled[index] = filled[leaf].shape[dim]
        return build.results.tensors(build.program.run(self, functools.partial(original.forward, self), filled))

    cls: Any = type(original.__name__, (original,), {"forward": forward, "__module__": original.__module__})
    view: nn.Module = cls.__new__(cls)
    view.__dict__ = module.__dict__
    return view


def _origins(module: nn.Module, traced: torch.export.ExportedProgram) -> dict[str, tuple[str | int, ...]]:
    places = {_place(tensor): tuple(steps) for steps, tensor in iter_tensors(module) if tensor.numel()}
    constants = {name: value for name, value in traced.constants.items() if isinstance(value, torch.Tensor)}
    return {
        name: places[_place(value)]
        for name, value in sorted(constants.items())
        if not isinstance(value, torch._subclasses.FakeTensor) and _place(value) in places
    }


def _asked_sizes(sizes: TracedSizes) -> tuple[Sequence[Any], Mapping[Any, tuple[int, int]]]:
    """The conditions on sizes before compiling adds to them, and the bounds of each symbol."""
    symbols = {symbol for tensor in sizes.inputs for size in tensor for symbol in sizes.symbols_in(size)}
    return sizes.conditions(), {symbol: sizes.bounds(symbol) for symbol in symbols}


def _sizes(
    traced: torch.export.ExportedProgram,
    varying: Varying,
    conditions: Sequence[Any],
    bounds: Mapping[Any, tuple[int, int]],
) -> Sizes:
    """Return what is asked of the sizes, as torch derived it.

    Tracing asked for the ``conditions``, and compiling may have added equations. The inequalities that it adds choose
    among ways of computing by the sizes that it sees, which are the largest; each way is right for smaller ones.
    """
    found = TracedSizes(traced)
    known: dict[Any, Symbol] = {}
    for place, symbol in sorted(varying.items()):
        index, dim = place
        size = found.inputs[index][dim]
        for term in found.symbols_in(size):
            if term not in known:
                taken = {other.name for other in known.values()}
                names = (symbol.name, *(f"{symbol.name}_{number}" for number in range(2, len(taken) + 2)))
                least, most = bounds.get(term) or found.bounds(term)
                if size == term:
                    least, most = max(symbol.least, least), min(symbol.most, most)
                known[term] = Symbol(next(name for name in names if name not in taken), least, most)
    if not known:
        ranges = ", ".join(sorted({str(one) for one in varying.values()}))
        raise CannotFreezeError(f"torch took its sizes as constant ({ranges})")

    def write(term: Any) -> str:
        if unknown := found.symbols_in(term) - known.keys():
            names = ", ".join(sorted(map(str, unknown)))
            raise CannotFreezeError(f"its sizes depend on {names}, and not on those of its inputs")
        text = found.write(term, {size: symbol.name for size, symbol in known.items()})
        try:
            expression(text)
        except ValueError as error:
            raise CannotFreezeError(f"what its sizes have to be cannot be written down: {error}") from error
        return text

    sizes = tuple(size if isinstance(size, int) else write(size) for sizes in found.inputs for size in sizes)
    texts = dict.fromkeys(write(term) for term in (*conditions, *found.conditions(equations_only=True)))
    return Sizes(sizes, tuple(known.values()), tuple(texts))


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _export(module: nn.Module, inputs: Sequence[torch.Tensor], varying: Varying) -> torch.export.ExportedProgram:
    shapes: list[dict[int, Any] | None] = [None] * len(inputs)
    for (index, dim), symbol in varying.items():
        hint: Any = torch.export.Dim.AUTO
        shapes[index] = {**(shapes[index] or {}), dim: hint(min=symbol.least, max=symbol.most)}
    dynamic = (tuple(shapes),) if varying else None
    try:
        with torch.no_grad(), _without_torchs_own_warnings():
            return torch.export.export(module, tuple(inputs), dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        # torch.export has no common root for its errors; whatever it raises means that this call cannot be traced.
        raise _build_error("torch.export", error) from error


def _compile(
    program: torch.export.ExportedProgram, options: BuildOptions, *, make_headers: bool
) -> tuple[list[str], dict[str, torch.Tensor]]:
    from torch._inductor.exc import InvalidCxxCompiler

    config: dict[str, Any] = {
        "aot_inductor.package": True,  # kernels and metadata are found by name, not by the path of this build
        "aot_inductor.package_constants_in_so": options.weights == "baked",
        "always_keep_tensor_constants": True,
        "aot_inductor.metadata": {},  # else Inductor writes this machine into its default, in place
        _EMBED_KERNELS: True,
        **(dict.fromkeys(FOLDS_WEIGHTS, False) if options.weights == "bound" else {}),  # whatever the process has set
        **options.config,
    }
    if options.weights == "bound":
        config["aot_inductor.package_constants_on_disk_format"] = "pickle_weights"
    try:
        with torch.no_grad(), _without_torchs_own_warnings():
            files = _compiled(program, config, make_headers=make_headers)
    except InvalidCxxCompiler as error:
        raise CompilerMissingError(
            f"No working C++ compiler: {_first_line(error)}. Install g++ (or set CXX), or load what another "
            "machine of the same type froze with mode='require'."
        ) from error
    except Exception as error:
        # Inductor raises anything from RuntimeError to CppCompileError; each means that this call cannot be compiled.
        raise _build_error("AOTInductor", error) from error
    weights = [item for item in files if not isinstance(item, str)]
    constants = {name: entry[0].detach() for found in weights for name, entry in found.items()}
    return [item for item in files if isinstance(item, str)], constants


def _compiled(program: torch.export.ExportedProgram, config: Mapping[str, Any], *, make_headers: bool) -> list[Any]:
    from torch._inductor import aot_compile

    def compiled(*, with_headers: bool) -> list[Any]:
        options = {"aot_inductor.precompile_headers": with_headers, **config}
        args, kwargs = program.example_inputs
        files = aot_compile(program.module(check_guards=False), args, kwargs, options=options)
        assert isinstance(files, list)  # aot_inductor.package is on
        return files

    headers = Headers(config)
    with headers.used(make=make_headers) as is_used:
        try:
            return compiled(with_headers=is_used)
        except Exception:  # whatever headers of another compiler provoke; what has another cause fails again
            if not is_used:
                raise
            headers.remove()
    return compiled(with_headers=False)


def _collect(files: Sequence[str], folder: Path) -> BuiltGraph:
    made = [Path(file) for file in files]
    [library] = [path for path in made if path.suffix == ".so"]
    [metadata] = [path for path in made if path.name == f"{library.stem}_metadata.json"]
    beside = {}
    for path in made:
        if path.name == f"{library.stem}.json":
            beside[EXTERN_NAME] = path
        elif path.suffix in _KERNEL_SUFFIXES:
            beside[path.name] = path
        elif path.name == _CUSTOM_OBJECTS:
            raise CannotFreezeError("the call uses objects of TorchScript, which are no part of a library")
    return BuiltGraph(
        library=Path(shutil.move(library, folder / LIBRARY_NAME)),
        beside={name: Path(shutil.move(path, folder / name)) for name, path in beside.items()},
        machine={name: str(value) for name, value in json.loads(metadata.read_bytes()).items()},
    )


def strip_symbols(library: Path) -> None:
    """Take out symbols for debuggers; not of baked weights, which ``strip`` would cut off the end of the file."""
    strip = shutil.which("strip")  # comes with the linker that made the library
    if strip is not None:
        subprocess.run([strip, str(library)], check=True, capture_output=True)


def _ties(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    groups: dict[tuple[int, Any, Any], list[str]] = {}
    for name, tensor in named_tensors(module):
        if tensor.numel():
            groups.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), []).append(name)
    return tuple(sorted(tuple(sorted(names)) for names in groups.values() if len(names) > 1))


def _write_constants(tensors: Mapping[str, torch.Tensor], path: Path) -> Path:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, str(path))
    return path


@contextmanager
def _build_folder(build: Digest) -> Iterator[Path]:
    """A private folder whose path depends on the build alone; if that one is taken, another, and a warning."""
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(scratch_folder("build", build.hex[:32]))
        except FileExistsError as error:
            logger.warning("%s, so this build will not be byte-identical to others of its key", error)
            folder = stack.enter_context(scratch_folder("build"))
        yield folder


@contextmanager
def _without_torchs_own_warnings() -> Iterator[None]:
    """Hide the warning of torch 2.13 about its own use of ``LeafSpec`` at each export, which users cannot act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
        yield


@contextmanager
def _inductor_caches_in(folder: Path) -> Iterator[None]:
    from torch._inductor.utils import clear_caches

    variables = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TMPDIR": str(folder),
    }
    before = {name: os.environ.get(name) for name in variables}
    clear_caches()
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        clear_caches()


def _build_error(step: str, error: Exception) -> CannotFreezeError:
    """The error for a failure of ``step``: one of the moment, such as a full disk, says so and is not remembered."""
    if what := passing_reason(error):
        forget_vector_isa()
        return InterruptedBuildError(
            f"{step} was interrupted: {what}. Free memory or disk space and try again; nothing was stored."
        )
    return CannotFreezeError(f"{step} failed: {_first_line(error)}")


def passing_reason(error: BaseException) -> str:
    """Return why a failed build may succeed another time, or nothing if the failure will stay."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        is_passing = isinstance(cause, (MemoryError, TimeoutError, torch.OutOfMemoryError))
        if is_passing or (isinstance(cause, OSError) and cause.errno in _PASSING_ERRNOS):
            return _first_line(cause)
        if found := _PASSING_TEXTS.search(text):
            return found[0]
        if type(cause).__name__ == "CppCompileError" and not _DIAGNOSTIC.search(text):
            return "the C++ compiler ended without a diagnostic"
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return ""


_PASSING_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EIO, errno.EMFILE, errno.ENFILE})
_PASSING_TEXTS = re.compile(
    r"Killed signal[^\n]*|No space left on device|Cannot allocate memory|out of memory[^\n]*"
    r"|virtual memory exhausted[^\n]*|Disk quota exceeded|Too many open files|Resource temporarily unavailable"
    r"|terminated by signal[^\n]*|died with <Signals[^\n]*"
    # setuptools, which the compiler imports, refuses a process that has imported Python's own distutils before.
    r"|AssertionError: \S*distutils\S*core\.py",
    re.IGNORECASE,
)
_DIAGNOSTIC = re.compile(r":\d+:\d+: (fatal )?error:|undefined reference|error: (unrecognized|unknown)")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__
