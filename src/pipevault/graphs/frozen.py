"""One frozen graph: a library that AOTInductor made, bound to the live weights of a module.

The library keeps raw pointers into the weights, so a :class:`Binding` notices before each call when anything has moved
(``module.to()``, offload hooks, ``parameter.data = …``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import msgspec
import torch
from torch import nn
from torch.utils import _pytree as pytree

from pipevault.compat.accelerate import offloaded_weight
from pipevault.compat.aot_inductor import GraphRunner
from pipevault.digest import digest_bytes, digest_json
from pipevault.errors import ChangedPartError
from pipevault.files.documents import Sha256
from pipevault.files.opened import OpenedFile
from pipevault.graphs.library import CONSTANTS_NAME, LIBRARY_NAME, GraphFiles, map_library
from pipevault.graphs.observe import named_tensors
from pipevault.graphs.program import Results, number_tensor
from pipevault.graphs.signature import ABSENT, CallSignature, Leaf

BAKED = "baked"
BASE_LAYER = "base_layer"
_PlainName: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}\Z")]
_ALIGNMENT_BYTES = 16
"""Inductor generates vector loads for inputs that were aligned when it compiled."""


@dataclass(frozen=True)
class GraphDocument:
    """The document of a graph; see :mod:`pipevault.graphs.document` for the JSON.

    ``library``, ``constants`` and the values of ``beside`` are the SHA-256 of files, ``build`` is the
    :func:`~pipevault.graphs.inductor.build_digest`. ``inputs`` has, for each tensor that the graph takes, the index of
    the call's leaf and the strides that the code was generated for. ``layout`` is the digest of names, dtypes, shapes
    and strides of the bound weights, or :data:`BAKED`. ``origins`` has name, steps and SHA-256 of each constant that is
    an attribute of a module. ``machine`` is what the compiler says that the library was built for: it is compared with
    this machine before the library is opened, because opening runs its code.
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
        results = {"results": self.results.leaves, "result_tree": self.results.tree}
        return {**vars(self), "signature": self.signature.to_json(), **results}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> GraphDocument:
        """Read a document. Raises ``KeyError``, ``TypeError`` or ``ValueError`` for a document of another form."""
        signature = CallSignature.from_json(document["signature"])
        results = {"leaves": document["results"], "tree": document["result_tree"]}
        return msgspec.convert({**document, "signature": signature, "results": results}, cls)


class Binding:
    """The live tensors that a graph reads, where they are looked up, and the tree of modules around them."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        """Raises ``KeyError`` or ``AttributeError`` for a tensor that is gone."""
        self._children = [(m._modules, list(m._modules.values())) for m in module.modules() if m._modules]
        self._sites = _sites(module, names)
        self.tensors = {name: owner[leaf] for name, (owner, leaf) in zip(names, self._sites, strict=True)}
        self._places = [_place(tensor) for tensor in self.tensors.values()]
        self._versions = self._read_versions()

    def _read_versions(self) -> list[int]:
        return [tensor._version for tensor in self.tensors.values() if not tensor.is_inference()]

    def holds(self) -> bool:
        """Return True if every tensor is where it was bound. Cheap: a few hundred pointers, strides and dtypes."""
        try:
            return [_place(owner[name]) for owner, name in self._sites] == self._places and not self.tree_changed()
        except (KeyError, AttributeError):  # deleted, or set to None
            return False

    def written_to(self) -> bool:
        """Return True if a tensor was changed in place. A write through ``.data`` counts no version and is not seen."""
        return self._read_versions() != self._versions

    def tree_changed(self) -> bool:
        """Return True if a sub-module was added, removed or replaced, as LoRA layers do."""
        return any(list(modules.values()) != children for modules, children in self._children)

    def layout(self) -> dict[str, str]:
        return {
            name: f"{str(tensor.dtype)[6:]}{list(tensor.shape)}{list(tensor.stride())}"
            for name, tensor in self.tensors.items()
        }


class FrozenGraph:
    """A library bound to a module. Calling it gives the result tree of the program that it was made from."""

    def __init__(self, document: GraphDocument, files: GraphFiles, *, device: torch.device, part: str) -> None:
        """Take ``files``, which may be closed afterwards."""
        self._library = map_library(document.library, files)
        self._runner = GraphRunner(self._library, device)
        self.document = document
        self.part = part
        self.device = device
        self._result_tree = pytree.treespec_loads(document.results.tree)
        self._lifted = {name: tensor.to(device) for name, tensor in _read_constants(files).items()}
        self._names = [name for name in self._runner.constants if name not in self._lifted]
        self._binding: Binding | None = None
        self._layout: dict[str, str] = {}
        self._borrowed = False

    def twin(self, part: str) -> FrozenGraph:
        """Return another graph of the same library, to be bound to the weights of ``part``."""
        twin = copy(self)
        twin.part = part
        twin._runner = GraphRunner(self._library, self.device)
        twin._binding, twin._layout, twin._borrowed = None, {}, False
        return twin

    def bind(self, module: nn.Module) -> None:
        """Point the graph at the live weights. Raises :class:`ChangedPartError` if they no longer fit it."""
        if self.is_baked:
            if self._binding is not None:
                raise self._changed("its weights changed, and this graph has the old ones compiled in")
            self._binding = Binding(module, [name for name, _ in named_tensors(module)])
            return
        try:
            binding = Binding(module, self._names)
            ties = [[owner[name] for owner, name in _sites(module, names)] for names in self.document.ties]
        except (AttributeError, KeyError) as error:
            raise self._changed(f"its tensor {error} is gone") from error
        layout = binding.layout()
        if digest_json(layout).hex != self.document.layout:
            raise self._changed(_first_change(self._layout, layout))
        for names, tensors in zip(self.document.ties, ties, strict=True):
            if len({tensor.data_ptr() for tensor in tensors if not tensor.is_meta}) > 1:
                raise self._changed(f"{' and '.join(names)} no longer share their weights")
        self._load(module, binding)
        self._binding, self._layout = binding, layout

    def fits(self, module: nn.Module) -> bool:
        """Return whether the weights of ``module`` have the layout that the graph was made for."""
        try:
            return self.is_baked or self.layout_digest(module) == self.document.layout
        except (AttributeError, KeyError):
            return False

    def layout_digest(self, module: nn.Module) -> str:
        """Return the ``layout`` of a document for the weights of ``module`` that the library reads."""
        return digest_json(Binding(module, self._names).layout()).hex

    @property
    def holds(self) -> bool:
        """Return True if what was bound is still in place."""
        is_bound = self.is_baked or self._runner.is_bound
        return is_bound and self._binding is not None and self._binding.holds()

    def __call__(
        self, module: nn.Module, leaves: Sequence[Leaf], *, verify: Callable[[nn.Module], str]
    ) -> dict[str, Any]:
        """Return the result tree for the leaves of a call: ``output``, ``arguments``, ``state``.

        ``verify`` says what graphs cannot follow of a module whose sub-modules changed, or nothing. It is not kept: a
        cycle would hold the weights of a pipeline that was dropped.
        """
        with self._runner.lock:
            if not self.holds or (self.is_baked and self._binding is not None and self._binding.written_to()):
                if self._binding is not None and self._binding.tree_changed() and (what := verify(module)):
                    raise self._changed(what)
                self.bind(module)
            inputs = [self._input(leaves, index, stride) for index, stride in self.document.inputs]
            tensors = iter(self._runner.run(inputs))
            if self._borrowed:  # given back, and borrowed again for the next call
                self._binding = None
                self._runner.release()
        made = [
            next(tensors) if kind[0] == "tensor" else leaves[kind[1]] if kind[0] == "leaf" else _constant(kind)
            for kind in self.document.results.leaves
        ]
        result: dict[str, Any] = pytree.tree_unflatten(made, self._result_tree)
        return result

    def _input(self, leaves: Sequence[Leaf], index: int, stride: tuple[int, ...]) -> torch.Tensor:
        leaf = leaves[index]
        if not isinstance(leaf, torch.Tensor):
            return number_tensor(leaf, leaves, self.device)
        if self.document.signature.is_range:
            stride = torch.empty(leaf.shape, device="meta").stride()
        if leaf.stride() == stride and not leaf.data_ptr() % _ALIGNMENT_BYTES:
            return leaf
        return torch.empty_strided(leaf.shape, stride, dtype=leaf.dtype, device=leaf.device).copy_(leaf)

    def _load(self, module: nn.Module, binding: Binding) -> None:
        """Weights that an offloading hook keeps elsewhere are borrowed: copied to the device for one call."""
        self._borrowed = False
        constants: dict[str, torch.Tensor] = dict(self._lifted)
        for name, tensor in binding.tensors.items():
            if tensor.device.type == self.device.type:
                constants[name] = tensor.detach()
                continue
            self._borrowed = True
            path, _, leaf = name.rpartition(".")
            found = offloaded_weight(module.get_submodule(path), leaf, tensor, self.device)
            if found is None:
                raise self._changed(f"{name} is on {tensor.device}, the graph runs on {self.device.type}")
            constants[name] = found.detach()
        self._runner.bind(constants)

    @property
    def is_baked(self) -> bool:
        return self.document.layout == BAKED

    def _changed(self, what: str) -> ChangedPartError:
        return ChangedPartError(
            f"{self.part} was changed after its graphs were frozen: {what}. Undo the change, or load the pipeline "
            "again in mode 'compile' to freeze the new state.",
            self.part,
        )


def _constant(kind: Sequence[Any]) -> Any:
    return ABSENT if kind[0] == "absent" else kind[1]


def _read_constants(files: GraphFiles) -> dict[str, torch.Tensor]:
    if CONSTANTS_NAME not in files:
        return {}
    from safetensors.torch import load_file

    return load_file(str(files[CONSTANTS_NAME].path))


def constant_sha256(tensor: torch.Tensor) -> str:
    """Return the hex SHA-256 of the elements of a small tensor in row-major order."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return digest_bytes(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"").hex


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
    """The module at ``path``. A LoRA layer of peft whose weights were fused counts as the layer that it wraps."""
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


def _first_change(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    for name, layout in after.items():
        if name in before and before[name] != layout:
            return f"{name} was {before[name]} and is {layout} (dtype, shape, strides)"
    return "dtypes, shapes or strides of its weights are not those that were frozen"
