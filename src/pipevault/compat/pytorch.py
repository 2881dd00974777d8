"""Touch points with torch: exported programs, Inductor's configuration, what the CPU and its libraries say."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# --- sizes of exported programs


class TracedSizes:
    """The sizes of the inputs of an exported program: whole numbers, or terms of sympy in symbols of torch's."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        names = set(program.graph_signature.user_inputs)
        values = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
        self._environment: Any = values[0].fake_mode.shape_env
        self.inputs = [tuple(map(self._term, value.shape)) for value in values]

    def _term(self, size: Any) -> Any:
        if isinstance(size, int):
            return size
        term = self._environment.replace(size.node.expr)
        return term if term.free_symbols else int(term)

    def symbols_in(self, term: Any) -> set[Any]:
        return set() if isinstance(term, int) else set(term.free_symbols)

    def bounds(self, symbol: Any) -> tuple[int, int]:
        """Return the smallest and the largest value of a symbol."""
        found = self._environment.var_to_range[symbol]
        return int(found.lower), min(int(found.upper), sys.maxsize)

    def conditions(self, *, equations_only: bool = False) -> list[Any]:
        """Return what the code relies on, so far, beyond those bounds; whether two terms are equal, or that alone."""
        from sympy import Equality, Unequality

        terms = [self._environment.replace(guard.expr) for guard in self._environment.guards]
        is_open = [term for term in terms if getattr(term, "free_symbols", None)]
        wanted = [term for term in is_open if not equations_only or isinstance(term, (Equality, Unequality))]
        return [term for term in wanted if self._environment._maybe_evaluate_static(term, axioms=()) is None]

    def write(self, term: Any, names: Mapping[Any, str]) -> str:
        """Return ``term`` as an expression of Python with other ``names`` for its symbols."""
        from sympy import Symbol
        from torch.utils._sympy.printers import PythonPrinter

        named = term.xreplace({symbol: Symbol(name, integer=True) for symbol, name in names.items()})
        return str(PythonPrinter().doprint(named))


# --- Inductor's configuration


def _config() -> Any:
    from torch._inductor import config

    return config


def _imported_config() -> Any:
    """Inductor's configuration; ``None`` until something imports it, and readers answer what it would read then."""
    return sys.modules.get("torch._inductor.config")


def inductor_options() -> dict[str, Any]:
    """Return the options in force that Inductor's own cache key takes, by dotted name.

    They are those of ``config.save_config_portable()``, which from torch 2.15 on imports the whole compiler to write
    them down. An option that a class stands for is given by the class's ``uuid()`` where somebody set it.
    """
    config = _config()
    ignored = ("_", *getattr(config, "_cache_config_ignore_prefix", ()))
    options = {name: value for name, value in config.get_config_copy().items() if not name.startswith(ignored)}
    for name in getattr(config, "_cache_config_factory_keys", ()):
        value = options.get(name)
        if value is not None and value is not inductor_default(name, value=None):
            instance = value()
            options[name] = instance.uuid() if hasattr(instance, "uuid") else value
    return options


def changed_inductor_options() -> dict[str, Any]:
    """Return the options that somebody set to other than torch's defaults, and that another process can be given."""
    values, plain = _config().get_config_copy(), (bool, int, float, str, type(None), list, tuple, dict)
    return {
        name: values[name]
        for name in inductor_options()
        if isinstance(values[name], plain) and values[name] != inductor_default(name, value=values[name])
    }


def with_inductor_options(options: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Set ``options`` inside."""
    patched: AbstractContextManager[None] = _config().patch(dict(options))
    return patched


def inductor_default(name: str, *, value: Any) -> Any:
    """Return torch's default of the option ``name``, or ``value`` where this version of torch does not tell it."""
    entry = getattr(_config(), "_config", {}).get(name)
    if entry is None or not hasattr(entry, "default") or getattr(entry, "justknob", None) is not None:
        return value
    return entry.default


def inductor_option_names() -> tuple[str, ...]:
    """Return the names of all of Inductor's options."""
    return tuple(_config().get_config_copy())


def compile_modes() -> tuple[str, ...]:
    """Return the modes of ``torch.compile`` by name."""
    return tuple(_modes())


def compile_mode_options(mode: str | None) -> dict[str, Any]:
    """Return the options of Inductor that a mode of ``torch.compile`` stands for, but for CUDA graphs.

    A library of AOTInductor is not recorded in a CUDA graph. Raises ``KeyError`` for an unknown mode.
    """
    options = {} if mode is None else _modes()[mode]
    return {name: value for name, value in options.items() if not name.startswith("triton.cudagraph")}


def _modes() -> Any:
    from torch import _inductor

    return _inductor.list_mode_options()


def inductor_vector_bits() -> int | None:
    """Read the width of vectors that Inductor was told to generate code for: 0 is none, ``None`` lets it choose."""
    config = _imported_config()
    if config is None:
        return 0 if os.environ.get("TORCHINDUCTOR_VEC_ISA_OK") == "0" else None
    bits: int | None = 0 if config.cpp.vec_isa_ok is False else config.cpp.simdlen
    return bits


def inductor_compilers() -> list[str]:
    """Return the C++ compilers that Inductor tries, first choice first."""
    config = _imported_config()
    if config is None:
        return [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
    candidates = config.cpp.cxx if isinstance(config.cpp.cxx, list | tuple) else (config.cpp.cxx,)
    return [candidate for candidate in candidates if candidate]


def inductor_deterministic() -> bool:
    """Read Inductor's deterministic mode, without importing it."""
    config = _imported_config()
    if config is None:
        return os.environ.get("TORCHINDUCTOR_DETERMINISTIC") == "1"
    return bool(getattr(config, "deterministic", False))  # torch 2.4 has none


def set_inductor_deterministic(value: bool) -> None:
    """Switch Inductor's deterministic mode."""
    if hasattr(_config(), "deterministic"):
        _config().deterministic = value


def forget_vector_isa() -> None:
    """Have Inductor probe the CPU's vector instructions again: it remembers a probe whose compiler was killed."""
    from torch._inductor import cpu_vec_isa

    classes = [cpu_vec_isa.VecISA]
    while classes:
        cls = classes.pop()
        classes.extend(cls.__subclasses__())
        for value in vars(cls).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
    cpu_vec_isa.valid_vec_isa_list.cache_clear()


@contextmanager
def one_vector_isa_probed(trials: Path | None = None) -> Iterator[None]:
    """Have Inductor probe the vector instructions in the block only until it finds those that it chooses.

    It compiles and runs trial programs for all that the CPU has, which takes seconds in each process that compiles, and
    takes the first. The trial of that one is kept in ``trials``, which no other user can change. Where something else
    chooses (``cpp.simdlen``, ``ATEN_CPU_CAPABILITY``), it probes all of them.
    """
    from torch._inductor import config, cpu_vec_isa

    probe_all = getattr(cpu_vec_isa.valid_vec_isa_list, "probe_all", cpu_vec_isa.valid_vec_isa_list)  # of two threads
    is_first = config.cpp.simdlen is None and "ATEN_CPU_CAPABILITY" not in os.environ
    if platform.machine() != "x86_64" or not is_first or probe_all.cache_info().currsize:
        yield
        return

    has = set(cpu_vec_isa.x86_isa_checker())
    known = [isa for isa in cpu_vec_isa.supported_vec_isa_list if {*str(isa).split()} <= has]
    if trials is not None and known:
        _try_kept(known[0], trials)

    def probe() -> list[Any]:
        return list(islice((isa for isa in known if isa), 1))

    probe_one: Any = cache(probe)
    probe_one.probe_all = probe_all
    cpu_vec_isa.valid_vec_isa_list = probe_one
    try:
        yield
    finally:
        cpu_vec_isa.valid_vec_isa_list = probe_all


@cache
def _try_kept(isa: Any, trials: Path) -> None:
    """Let ``isa`` remember what its trial in ``trials`` shows. One that fails is forgotten: it may be half written."""
    variable = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(variable)
    os.environ[variable] = str(trials)
    try:
        works = bool(isa)
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
    if not works:
        shutil.rmtree(trials, ignore_errors=True)
        forget_vector_isa()


def can_precompile_headers() -> bool:
    """Return whether AOTInductor can use precompiled headers here; it hashes them with a program."""
    from torch._inductor import codecache

    names = ("_precompile_header", "_HEADER_DIR", "_HEADER_LOCK_DIR")
    return all(hasattr(codecache, name) for name in names) and shutil.which("openssl") is not None


@contextmanager
def headers_precompiled_in(folder: Path) -> Iterator[None]:
    """Have AOTInductor keep precompiled headers in ``folder`` in the block, instead of in the common temporary one."""
    from torch._inductor import codecache

    module: Any = codecache
    before = module._HEADER_DIR, module._HEADER_LOCK_DIR
    module._HEADER_DIR, module._HEADER_LOCK_DIR = str(folder), str(folder / "locks")
    module._precompile_header.cache_clear()  # it remembers where they are
    try:
        yield
    finally:
        module._HEADER_DIR, module._HEADER_LOCK_DIR = before
        module._precompile_header.cache_clear()


# --- the machine as torch sees it


def cpu_capabilities() -> Mapping[str, Any]:
    """Return the CPU's instruction sets and cache sizes by torch's names; before torch 2.9 those that Linux names."""
    import torch

    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    return {re.sub(r"^avx512_?", "avx512_", name): True for name in cpu_info("flags").split()}


def cpu_info(name: str) -> str:
    """Return what Linux says of the first CPU under ``name``; nothing elsewhere, or in a sandbox without ``/proc``."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def init_amx() -> bool:
    """Ask the system for AMX, as Inductor does before it picks it: Linux grants it to a process on request."""
    import torch

    return hasattr(torch.cpu, "_init_amx") and bool(torch.cpu._init_amx())


def mkl_threads() -> int | None:
    """Return the number of threads that MKL uses; ``None`` in builds without MKL."""
    import torch

    found = re.search(r"mkl_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())
    return int(found[1]) if found else None


def onednn_version() -> str:
    """Return the version of oneDNN that torch was built with; ``none`` in builds without it."""
    import torch

    found = re.search(r"MKL-DNN v(\S+)", torch.__config__.show())
    return found[1] if found else "none"


def has_tunable_op() -> bool:
    """Return whether this build can time GEMM kernels as the program runs: ``torch.cuda.tunable`` raises elsewhere."""
    import torch

    return hasattr(torch._C, "_cuda_tunableop_is_enabled")


def builtin_attention() -> Any:
    """Return torch's own ``scaled_dot_product_attention``, whatever stands under its public name."""
    import torch

    nn: Any = torch._C._nn
    return nn.scaled_dot_product_attention


# --- modes


@contextmanager
def without_modes() -> Iterator[None]:
    """Run without the function and dispatch modes of this thread and outside of inference mode; a default device stays.

    Export would trace what a mode does, such as logging noise.
    """
    import torch
    from torch.utils._device import DeviceContext
    from torch.utils._python_dispatch import _disable_current_modes

    popped = []
    while torch._C._len_torch_function_stack():
        popped.append(torch._C._pop_torch_function_stack())
    kept = [mode for mode in popped if isinstance(mode, DeviceContext)]
    for mode in reversed(kept):
        torch._C._push_on_torch_function_stack(mode)
    try:
        with _disable_current_modes(), torch.inference_mode(False):
            yield
    finally:
        for _ in kept:
            torch._C._pop_torch_function_stack()
        for mode in reversed(popped):
            torch._C._push_on_torch_function_stack(mode)
