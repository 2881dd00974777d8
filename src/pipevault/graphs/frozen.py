"""One frozen graph: a library that AOTInductor made, bound to the live weights of a module.

The library is opened with torch's native runner, which imports no part of the compiler. With ``user_managed``
constants it keeps raw pointers into the weights, so a :class:`Binding` holds what is bound and notices before each
call when anything has moved (``module.to()``, offload hooks, ``parameter.data = …``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
import torch
from torch import nn
from torch.utils import _pytree as pytree

from pipevault.compat.pytorch import GraphRunner
from pipevault.digest import digest_bytes, digest_json
from pipevault.errors import ChangedPartError
from pipevault.files.documents import Sha256
from pipevault.files.opened import OpenedFile
from pipevault.graphs.library import CONSTANTS_NAME, LIBRARY_NAME, GraphFiles, map_library
from pipevault.graphs.observe import follow
from pipevault.graphs.program import Results, number_tensor
from pipevault.graphs.signature import ABSENT, CallSignature, Leaf


class Host:
    """The owner that a graph asks when its module has changed.

    It is asked with each call and not kept: a cycle would hold the weights of a pipeline that was dropped.
    """

    def verify(self, module: nn.Module) -> str:
        """Return what the graphs cannot follow of a module whose sub-modules changed, or nothing."""
        return ""

    def offloaded(self, name: str, tensor: torch.Tensor, device: torch.device) -> torch.Tensor | None:
        """Return the weight of that name on ``device``, where an offloading hook keeps it elsewhere."""
        return None


BAKED = "baked"
BASE_LAYER = "base_layer"
_PlainName: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}\Z")]
_ALIGNMENT_BYTES = 16
"""Inductor generates vector loads for inputs that were aligned when it compiled."""


@dataclass(frozen=True)
class GraphDocument:
    """The document of a graph; see :mod:`pipevault.graphs.document` for the JSON.

    ``library``, ``constants`` and the values of ``beside`` (files by name) are the SHA-256 of files, ``build`` is the
    :func:`~pipevault.graphs.inductor.build_digest`. ``inputs`` has, for each tensor that the graph takes, the index of
    the call's leaf and the strides that the code was generated for. ``results`` tells how its tensors become the output
    of the part, the arguments that it writes to and its state. ``layout`` is the digest of names, dtypes, shapes and
    strides of the bound weights, or :data:`BAKED` if the weights are compiled in. ``origins`` has name, steps and
    SHA-256 of each constant that is an attribute of a module. ``machine`` is what the compiler says that the
    library was built for, to be compared with this machine before the library is opened, because opening runs its code.
    """

    signature: CallSignature
    build: str
    library: Sha256
    constants: Sha256 | None
    beside: Mapping[_PlainName, Sha256]
    inputs: tuple[tuple[int, tuple[int, ...]], ...]
    results: Results
    ties: tuple[tuple[str, ...], ...]
    layout: str
    origins: tuple[tuple[str, tuple[str | int, ...], str], ...]
    machine: Mapping[str, str]
    checks: Mapping[str, Any]

    @property
    def files(self) -> dict[str, str]:
        """The digest of each file of the graph, by name."""
        constants = {CONSTANTS_NAME: self.constants} if self.constants else {}
        return {LIBRARY_NAME: self.library, **constants, **self.beside}

    def open_files(self, open_file: Callable[[str, str], OpenedFile]) -> GraphFiles:
        """Open the files by ``open_file``, which takes a name and a digest; whatever it raises, nothing stays open."""
        with ExitStack() as stack:
            opened = {name: stack.enter_context(open_file(name, digest)) for name, digest in self.files.items()}
            stack.pop_all()
        return GraphFiles(opened)

    def to_json(self) -> dict[str, Any]:
        return {
            "signature": self.signature.to_json(),
            "build": self.build,
            "library": self.library,
            "constants": self.constants,
            "beside": dict(self.beside),
            "inputs": self.inputs,
            "results": self.results.leaves,
            "result_tree": self.results.tree,
            "ties": self.ties,
            "layout": self.layout,
            "origins": self.origins,
            "machine": dict(self.machine),
            "checks": dict(self.checks),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> GraphDocument:
        """Read a document. Raises ``KeyError``, ``TypeError`` or ``ValueError`` for a document of another form."""
        signature = CallSignature.from_json(document["signature"])
        results = {"leaves": document["results"], "tree": document["result_tree"]}
        return msgspec.convert({**document, "signature": signature, "results": results}, cls)


class Binding:
    """The live tensors that a graph reads, where they are looked up, and the tree of modules around them."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self._children = [(m._modules, list(m._modules.values())) for m in module.modules() if m._modules]
        self._sites = _sites(module, names)
        self.names = tuple(names)
        self.tensors = self.live()
        self._places = [_place(tensor) for tensor in self.tensors]
        self._versions = [tensor._version for tensor in self.tensors if not tensor.is_inference()]

    def live(self) -> list[torch.Tensor]:
        return [owner[name] for owner, name in self._sites]

    def holds(self) -> bool:
        """Return True if every tensor is where it was bound. Cheap: a few hundred pointers, strides and dtypes."""
        try:
            return [_place(owner[name]) for owner, name in self._sites] == self._places and not self.tree_changed()
        except (KeyError, AttributeError):  # deleted, or set to None
            return False

    def written_to(self) -> bool:
        """Return True if a tensor was changed in place. A write through ``.data`` counts no version and is not seen."""
        return [tensor._version for tensor in self.tensors if not tensor.is_inference()] != self._versions

    def tree_changed(self) -> bool:
        """Return True if a sub-module was added, removed or replaced, as LoRA layers do."""
        return any(list(modules.values()) != children for modules, children in self._children)

    def layout(self) -> dict[str, str]:
        return {name: _layout(tensor) for name, tensor in zip(self.names, self.tensors, strict=True)}


class FrozenGraph:
    """A library bound to a module. Calling it gives the result tree of the program that it was made from."""

    def __init__(
        self,
        document: GraphDocument,
        files: GraphFiles,
        *,
        device: torch.device,
        part: str,
    ) -> None:
        """Take ``files``, which may be closed afterwards."""
        self._library = map_library(document.library, files)
        self._runner = GraphRunner(self._library, device)
        self.document = document
        self.part = part
        self.device = device
        self._result_tree = pytree.treespec_loads(document.results.tree)
        lifted = read_constants(files.constants.path) if files.constants else {}
        self._lifted = {name: tensor.to(device) for name, tensor in lifted.items()}
        self._constants = self._runner.constants
        self._binding: Binding | None = None
        self._layout: dict[str, str] | None = None
        self._borrowed = False
        self._held: Mapping[str, torch.Tensor] | None = None

    def twin(self, part: str) -> FrozenGraph:
        """Return another graph of the same library, to be bound to the weights of ``part``."""
        twin = copy(self)
        twin.part = part
        twin._runner = GraphRunner(self._library, self.device)
        twin._binding, twin._held, twin._layout, twin._borrowed = None, None, None, False
        return twin

    def bind(self, module: nn.Module, host: Host) -> None:
        """Point the graph at the live weights. Raises :class:`ChangedPartError` if they no longer fit it."""
        if self.is_baked:
            self._watch_baked(module)
            return
        names = [name for name in self._constants if name not in self._lifted]
        try:
            binding = Binding(module, names)
        except (AttributeError, KeyError) as error:
            raise ChangedPartError(self._changed(f"its tensor {error} is gone"), self.part) from error
        layout = binding.layout()
        if self._digest(layout) != self.document.layout:
            raise ChangedPartError(self._changed(_first_change(self._layout or {}, layout)), self.part)
        _check_ties(module, self.document.ties, self)
        self._load(binding, host)
        self._binding, self._layout = binding, layout

    def fits(self, module: nn.Module) -> bool:
        """Return whether the weights of ``module`` have the layout that the graph was made for."""
        if self.is_baked:
            return True
        names = [name for name in self._constants if name not in self._lifted]
        try:
            return self._digest(Binding(module, names).layout()) == self.document.layout
        except (AttributeError, KeyError):
            return False

    @property
    def holds(self) -> bool:
        """Return True if what was bound is still in place."""
        return self._binding is not None and self._binding.holds()

    def __call__(self, module: nn.Module, leaves: Sequence[Leaf], host: Host) -> dict[str, Any]:
        """Return the result tree for the leaves of a call: ``output``, ``arguments``, ``state``."""
        if self._binding is None or not self._binding.holds() or (self.is_baked and self._binding.written_to()):
            if self._binding is not None and self._binding.tree_changed() and (what := host.verify(module)):
                raise ChangedPartError(self._changed(what), self.part)
            self.bind(module, host)
        inputs = [self._input(leaves, index, stride) for index, stride in self.document.inputs]
        tensors = iter(self._runner.run(inputs))
        made = [
            next(tensors) if kind[0] == "tensor" else leaves[kind[1]] if kind[0] == "leaf" else _constant(kind)
            for kind in self.document.results.leaves
        ]
        result: dict[str, Any] = pytree.tree_unflatten(made, self._result_tree)
        if self._borrowed:
            self._release()
        return result

    def _input(self, leaves: Sequence[Leaf], index: int, stride: tuple[int, ...]) -> torch.Tensor:
        leaf = leaves[index]
        if not isinstance(leaf, torch.Tensor):
            return number_tensor(leaf, leaves, self.device)
        if self.document.signature.is_range:
            stride = contiguous_strides(leaf.shape)
        if leaf.stride() != stride or leaf.data_ptr() % _ALIGNMENT_BYTES:
            return _with_stride(leaf, stride)
        return leaf

    def _load(self, binding: Binding, host: Host) -> None:
        """Weights that an offloading hook keeps elsewhere are borrowed: copied to the device for one call."""
        self._borrowed = False
        constants: dict[str, torch.Tensor] = dict(self._lifted)
        for name, tensor in zip(binding.names, binding.tensors, strict=True):
            if tensor.device.type != self.device.type:
                self._borrowed = True
            constants[name] = self._on_device(name, tensor, host)
        if constants:
            self._runner.bind(constants)
        self._held = constants

    def _on_device(self, name: str, tensor: torch.Tensor, host: Host) -> torch.Tensor:
        if tensor.device.type == self.device.type:
            return tensor.detach()
        found = host.offloaded(name, tensor, self.device)
        if found is None:
            raise ChangedPartError(
                self._changed(f"{name} is on {tensor.device}, the graph runs on {self.device.type}"), self.part
            )
        return found.detach()

    def _release(self) -> None:
        """Give back what was borrowed for one call; the next call borrows again."""
        self._binding, self._held = None, None

    def _watch_baked(self, module: nn.Module) -> None:
        if self._binding is not None:
            raise ChangedPartError(
                self._changed("its weights changed, and this graph has the old ones compiled in"), self.part
            )
        parameters = module.named_parameters(remove_duplicate=False)
        buffers = module.named_buffers(remove_duplicate=False)
        self._binding = Binding(module, [name for named in (parameters, buffers) for name, _ in named])

    @property
    def is_baked(self) -> bool:
        return self.document.layout == BAKED

    @staticmethod
    def _digest(layout: Mapping[str, str]) -> str:
        return digest_json(dict(layout)).hex

    def _changed(self, what: str) -> str:
        return (
            f"{self.part} was changed after its graphs were frozen: {what}. Undo the change, or load the pipeline "
            "again in mode 'compile' to freeze the new state."
        )


def _constant(kind: Sequence[Any]) -> Any:
    return ABSENT if kind[0] == "absent" else kind[1]


def layout_digest(module: nn.Module, library: str, device: torch.device, lifted: Sequence[str]) -> str:
    """Return the ``layout`` of a fresh library, which is mapped: the digest over the live tensors that it reads."""
    names = [name for name in GraphRunner(library, device).constants if name not in lifted]
    return FrozenGraph._digest(Binding(module, names).layout())


def read_constants(path: Path | None) -> dict[str, torch.Tensor]:
    if path is None:
        return {}
    from safetensors.torch import load_file

    return load_file(str(path))


def live_constant(module: nn.Module, steps: Sequence[str | int]) -> torch.Tensor | None:
    """Return the attribute that a constant of a graph was taken from; ``None`` where the module has none yet."""
    value = follow(module, steps)
    return value if isinstance(value, torch.Tensor) else None


def constant_sha256(tensor: torch.Tensor) -> str:
    """Return the hex SHA-256 of the elements of a small tensor in row-major order."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return digest_bytes(plain.view(torch.uint8).numpy().tobytes()).hex if plain.numel() else digest_bytes(b"").hex


def _sites(module: nn.Module, names: Sequence[str]) -> list[tuple[dict[str, Any], str]]:
    """Return where the tensors of a graph live now. Raises ``KeyError`` or ``AttributeError`` for one that is gone."""
    owners: dict[str, nn.Module] = {}
    sites = []
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = owners.get(path)
        if owner is None:
            owner = owners[path] = _owner(module, path)
        for tensors in (owner._parameters, owner._buffers):
            if tensors.get(leaf) is not None:
                sites.append((tensors, leaf))
                break
        else:
            raise KeyError(name)
    return sites


def _owner(module: nn.Module, path: str) -> nn.Module:
    """The module at ``path``. A LoRA layer of peft whose weights were fused counts as the layer that it wraps,
    whichever of the two the graph was made from.
    """
    owner = module
    for step in path.split(".") if path else ():
        if step == BASE_LAYER and step not in owner._modules:
            continue
        if step not in owner._modules and getattr(owner, "merged", False):
            owner = owner.get_submodule(BASE_LAYER)
        child = owner._modules.get(step)
        owner = owner.get_submodule(step) if child is None else child
    if BASE_LAYER in owner._modules and getattr(owner, "merged", False):
        owner = owner.get_submodule(BASE_LAYER)
    return owner


def _place(tensor: torch.Tensor) -> tuple[int, tuple[int, ...], torch.dtype]:
    return tensor.data_ptr(), tensor.stride(), tensor.dtype


def _layout(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype)[6:]}{list(tensor.shape)}{list(tensor.stride())}"


def _first_change(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    for name, layout in after.items():
        if name in before and before[name] != layout:
            return f"{name} was {before[name]} and is {layout} (dtype, shape, strides)"
    return "dtypes, shapes or strides of its weights are not those that were frozen"


def _check_ties(module: nn.Module, ties: Sequence[Sequence[str]], graph: FrozenGraph) -> None:
    for names in ties:
        try:
            tensors = [owner[name] for owner, name in _sites(module, names)]
        except (AttributeError, KeyError) as error:
            raise ChangedPartError(graph._changed(f"its tensor {error} is gone"), graph.part) from error
        if len({tensor.data_ptr() for tensor in tensors if not tensor.is_meta}) > 1:
            raise ChangedPartError(graph._changed(f"{' and '.join(names)} no longer share their weights"), graph.part)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a tensor of ``shape`` in row-major order, as torch gives them."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _with_stride(tensor: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    result = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
    return result.copy_(tensor)


def iter_devices(module: nn.Module) -> Iterator[torch.device]:
    for tensors in (module.parameters(), module.buffers()):
        yield from (tensor.device for tensor in tensors)
