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
from pipevault.graphs.state import PartOptions, PartState


class FrozenPart(DeployableModule):  # type: ignore[misc]
    """Mix-in of every class that :func:`freeze_class` makes.

    The state lies in a slot, because the ``__dict__`` is shared with the eager module and, in pipelines that share
    components, with other frozen parts.
    """

    __slots__ = ("_pipevault_state",)

    _pipevault_state: PartState
    _pipevault_original_class: ClassVar[type[nn.Module]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Does not pass on: transformers resolves the type hints of each new model class, which takes 15 ms."""

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
        copied.__dict__ = deepcopy(_own_attributes(self), memo)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickled part comes back eager, for the same reason."""
        return _restore, (self._pipevault_original_class, _own_attributes(self))


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
    object.__setattr__(part, "_pipevault_state", state)
    if "forward" in part.__dict__ and "_old_forward" in part.__dict__:
        # accelerate's hooks replace the instance's forward and call the one they found; it must be the frozen one.
        state.hooked_forward = part.__dict__["_old_forward"]
        part.__dict__["_old_forward"] = cls.forward.__get__(part)
    elif "forward" in part.__dict__:
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
    return state.module


def part_state(module: nn.Module) -> PartState:
    return cast(FrozenPart, module)._pipevault_state


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    """What a copy takes along: not the forward that accelerate put on the instance, which calls the frozen one."""
    return {k: v for k, v in module.__dict__.items() if k not in {"forward", "_old_forward"}}


def _restore(original: type[nn.Module], attributes: dict[str, Any]) -> nn.Module:
    module = original.__new__(original)
    module.__dict__ = attributes
    return module
