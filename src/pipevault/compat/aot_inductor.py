"""Touch points with AOTInductor's runtime: a compiled graph is opened, pointed at weights, and run.

torch's own ``aoti_load_package`` imports the compiler, which takes longer than a whole load, and unpacks an archive to
the temporary folder. Its runner for one library does neither, but it holds Python's lock while a graph runs on the CPU.
So a library is called through the C interface that it exports
(``torch/csrc/inductor/aoti_runtime/interface.h``), and through the runner where it lacks a function of that.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipevault.compat.pytorch import without_modes

if TYPE_CHECKING:
    import torch

_ONE_AT_A_TIME = 1
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


class GraphRunner:
    """A graph that AOTInductor compiled to a shared library. Tensors go by their names in the module (``constants``).

    A graph never gives back what it was pointed at. So it is pointed at tensors of the runner's own, once. These share
    the data of weights, are moved on to other weights, and are emptied at the end.
    """

    def __init__(self, library: str | Path, device: torch.device) -> None:
        """Open ``library``, which the process has mapped; kernels of a GPU in files of their own lie next to it."""
        self._library, self._device = str(library), device
        self.forget()
        self._open()
        self.constants = tuple(dict.fromkeys(self._graph.names.values()))
        _RUNNERS.add(self)

    def forget(self) -> None:
        """Open the library again before the next use: in a forked child another thread may have been inside."""
        self.lock = threading.Lock()
        """Held while the graph is bound and run."""
        self._is_open = self.is_bound = False

    def _open(self) -> None:
        is_native = self._device.type == "cpu" and _Native.runs(self._library)
        self._graph: _Graph = _Native(self._library) if is_native else _Torch(self._library, self._device)
        self._pointers: dict[str, torch.Tensor] = {}
        self._is_open = True

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Point the graph at a tensor for each of :attr:`constants`, until :meth:`release` or another call of this."""
        import torch

        if not self._is_open:
            self._open()
        is_first = not self._pointers
        if is_first:
            with torch.inference_mode(False):
                self._pointers = {
                    name: torch.empty(0, dtype=tensor.dtype, device=tensor.device) for name, tensor in tensors.items()
                }
            weakref.finalize(self, _empty, self._pointers).atexit = False
        for name, pointer in self._pointers.items():
            tensor = tensors[name]
            pointer.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
        names = self._graph.names if is_first else {}
        try:
            self._graph.update({inside: self._pointers[name] for inside, name in names.items()})
        except BaseException:  # whatever it was goes on; the graph may have some of them
            self._is_open = self.is_bound = False
            raise
        self.is_bound = True

    def release(self) -> None:
        """Hold no tensor any longer; :meth:`bind` comes before the next :meth:`run`."""
        self.is_bound = False
        _empty(self._pointers)

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return what the graph computes. Raises ``RuntimeError`` for what its code refuses."""
        if not self._is_open:  # one that is bound to nothing
            self._open()
        return self._graph.run(inputs)


_RUNNERS: weakref.WeakSet[GraphRunner] = weakref.WeakSet()


def _forget_all() -> None:
    for runner in list(_RUNNERS):
        runner.forget()


os.register_at_fork(after_in_child=_forget_all)


def _empty(pointers: Mapping[str, torch.Tensor]) -> None:
    with without_modes():  # the garbage collector may come while this thread traces a program
        for pointer in pointers.values():
            pointer.set_()  # type: ignore[call-overload]


class _Graph(Protocol):
    names: dict[str, str]
    """For each constant inside the graph its name in the module."""

    def update(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Point at the data of ``tensors`` and, for constants that are left out, of the tensors that it has."""

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]: ...


class _Torch:
    """A graph in torch's runner."""

    def __init__(self, library: str, device: torch.device) -> None:
        import torch

        if device.type == "cpu":
            self._runner: Any = torch._C._aoti.AOTIModelContainerRunnerCpu(library, _ONE_AT_A_TIME)
        else:
            runner = getattr(torch._C._aoti, f"AOTIModelContainerRunner{device.type.capitalize()}")
            self._runner = runner(library, _ONE_AT_A_TIME, str(device), os.path.dirname(library))
        self.names: dict[str, str] = self._runner.get_constant_names_to_original_fqns()

    def update(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._runner.update_constant_buffer(dict(tensors), False, bool(tensors), True)

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        outputs: list[torch.Tensor] = self._runner.run(inputs)
        return outputs


@functools.cache
def _functions(library: str) -> ctypes.CDLL:
    """The functions of a library that is mapped: once, because each of these objects makes a class."""
    return ctypes.CDLL(library)


class _Entry(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("handle", ctypes.c_void_p))


class _Native:
    """A graph of the CPU in a container that its library makes, called without Python's lock."""

    _BIND = "AOTInductorModelContainerUpdateUserManagedConstantBufferPairs"

    @classmethod
    def runs(cls, library: str) -> bool:
        """Return False for a library without that interface, or with operators that torch's runner calls for it."""
        import torch

        functions = _functions(library)
        is_complete = all(hasattr(functions, name) for name in (cls._BIND, "AOTInductorGetLastError"))
        has_handles = hasattr(torch._C._aoti, "unsafe_alloc_void_ptrs_from_tensors")
        return is_complete and has_handles and not Path(library).with_suffix(".json").exists()

    def __init__(self, library: str) -> None:
        self._functions = functions = _functions(library)
        self._handle = ctypes.c_void_p()
        models = ctypes.c_size_t(_ONE_AT_A_TIME)
        self._call("AOTInductorModelContainerCreateWithDevice", ctypes.byref(self._handle), models, b"cpu", None)
        pid, delete, handle = os.getpid(), functions.AOTInductorModelContainerDelete, self._handle
        weakref.finalize(self, lambda: delete(handle) if pid == os.getpid() else None).atexit = False
        self.names = {
            self._text("AOTInductorModelContainerGetConstantName", index): self._text(
                "AOTInductorModelContainerGetConstantOriginalFQN", index
            )
            for index in range(self._count("AOTInductorModelContainerGetNumConstants"))
        }
        self._counts = [self._count(f"AOTInductorModelContainerGetNum{name}") for name in ("Inputs", "Outputs")]

    def update(self, tensors: Mapping[str, torch.Tensor]) -> None:
        handles = _handles(list(tensors.values()))
        pairs = zip(tensors, handles, strict=True)
        entries = (_Entry * len(tensors))(*(_Entry(name.encode(), handle) for name, handle in pairs))
        try:
            self._call(self._BIND, self._handle, entries, ctypes.c_size_t(len(entries)), False, bool(entries))
        finally:
            _tensors(handles)

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        taken, made = self._counts
        if len(inputs) != taken:  # the library would end the process
            raise RuntimeError(f"The graph takes {taken} tensors and was given {len(inputs)}.")
        given, results = (ctypes.c_void_p * taken)(*_handles(inputs)), (ctypes.c_void_p * made)()
        sizes = ctypes.c_size_t(taken), ctypes.c_size_t(made)
        self._call("AOTInductorModelContainerRun", self._handle, given, sizes[0], results, sizes[1], None, None)
        return _tensors(results)

    def _call(self, name: str, *arguments: object) -> None:
        if getattr(self._functions, name)(*arguments):
            message = ctypes.c_char_p()
            self._functions.AOTInductorGetLastError(ctypes.byref(message))
            raise RuntimeError(f"{name}: {(message.value or b'no message').decode(errors='replace')}")

    def _count(self, name: str) -> int:
        count = ctypes.c_size_t()
        self._call(name, self._handle, ctypes.byref(count))
        return count.value

    def _text(self, name: str, index: int) -> str:
        text = ctypes.c_char_p()
        self._call(name, self._handle, ctypes.c_size_t(index), ctypes.byref(text))
        return (text.value or b"").decode()


def _handles(tensors: list[torch.Tensor]) -> list[int]:
    """Return new handles of tensors, for a function that takes them over, or for :func:`_tensors`."""
    import torch

    return [_capsule_pointer(made, None) for made in torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(tensors)]


def _tensors(handles: Any) -> list[torch.Tensor]:
    """Return the tensors of handles, which end with that."""
    import torch

    made = [_capsule(handle, None, None) for handle in handles]
    tensors: list[torch.Tensor] = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(made)
    return tensors
