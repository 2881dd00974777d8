"""A part of a pipeline that runs frozen graphs and is still an instance of its own class.

Pipelines test ``isinstance(controlnet, ControlNetModel)``, so a part is not wrapped: it becomes an object of a class
made from (:class:`FrozenPart`, original class) that shares the original's ``__dict__``. Attributes, hooks, ``.to()``
and ``.config`` work without being forwarded. It is a OneDiff ``DeployableModule``: onediffx's ``compile_pipe``,
``save_pipe`` and ``load_pipe`` drive it.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, cast

from onediff.infer_compiler import DeployableModule
from torch import nn

from pipevault.errors import CannotFreezeError
from pipevault.graphs.state import STATE, PartOptions, PartState, tracing_view


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


def _restore(original: type[nn.Module], attributes: dict[str, Any]) -> nn.Module:
    module = original.__new__(original)
    module.__dict__ = attributes
    return module
