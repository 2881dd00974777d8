"""A part of a pipeline that runs frozen graphs and is still an instance of its own class.

Pipelines test ``isinstance(controlnet, ControlNetModel)``, so a part is not wrapped: it becomes an object of a class
made from (:class:`FrozenPart`, original class) that shares the original's ``__dict__``. Attributes, hooks, ``.to()``
and ``.config`` work without being forwarded. It is a OneDiff ``DeployableModule``: onediffx's ``compile_pipe``,
``save_pipe`` and ``load_pipe`` drive it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, cast

from onediff.infer_compiler import DeployableModule
from torch import nn

from pipevault.compat.diffusers import inner_forwards
from pipevault.errors import CannotFreezeError, ChangedPartError, SettingsError
from pipevault.graphs.state import PartOptions, PartState

BACKEND = "inductor"
"""The name of the backend that freezes modules, in OneDiff's registry."""


class FrozenPart(DeployableModule):  # type: ignore[misc]
    """The mix-in of every class that :func:`freeze_class` makes.

    The state lies in a slot, because the ``__dict__`` is shared with the eager module and, in pipelines that share
    components, with other frozen parts.
    """

    __slots__ = ("_pipevault_state",)

    _pipevault_state: PartState
    _pipevault_original_class: ClassVar[type[nn.Module]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Does not pass on: transformers resolves the type hints of each new model class, which takes 15 ms."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if "forward" in self.__dict__:
            _rewire(self)
        return super().__call__(*args, **kwargs)

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
    """The class made for ``original``, whose name it bears: ``save_pretrained`` writes what it always wrote."""
    shown = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(original.__name__, (FrozenPart, original), {**shown, "_pipevault_original_class": original})


def freeze_module(module: nn.Module, options: PartOptions) -> nn.Module:
    """Return ``module`` as a frozen part that shares its ``__dict__``.

    Raises :class:`SettingsError` for anything but a module, :class:`CannotFreezeError` for what :func:`obstacle` tells.
    """
    if not isinstance(module, nn.Module):
        raise SettingsError(f"The backend {BACKEND!r} compiles modules, not a {type(module).__name__}.")
    if isinstance(module, FrozenPart):
        part_state(module).options = options
        return module
    if what := obstacle(module):
        raise CannotFreezeError(f"{type(module).__name__} cannot be frozen: {what}.", type(module).__name__)
    cls = freeze_class(type(module))  # type: ignore[arg-type]
    part = cls.__new__(cls)
    part.__dict__ = module.__dict__
    object.__setattr__(part, "_pipevault_state", PartState(module, options))
    _rewire(part)
    return part


def obstacle(module: nn.Module) -> str:
    """Return why graphs of ``module`` would never run, or nothing."""
    if isinstance(module, FrozenPart):
        return ""
    if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
        return "torch.compile was applied to it; load the pipeline without, since its graphs are compiled already"
    if "forward" in module.__dict__ and _innermost(module) is None:
        return "its forward was replaced on the instance, so its graphs would never run; undo the patch"
    return ""


def unfrozen(module: nn.Module) -> nn.Module:
    """Return the eager module behind a frozen part; other modules come back as they are."""
    return part_state(module).module if isinstance(module, FrozenPart) else module


def release(module: nn.Module) -> nn.Module:
    """Return the eager module behind a frozen part, whose hooks call its own forward again."""
    state, own = part_state(module), module.__dict__
    frozen = state.hooked_forward
    if frozen is not None:
        if own.get("forward") is frozen:  # the hook that called it was removed
            del own["forward"]
        for get, put in _inner_forwards(module):
            if get() is frozen:
                put(type(state.module).forward.__get__(state.module))
        state.hooked_forward = None
    return state.module


def _rewire(part: nn.Module) -> None:
    """Have hooks that replaced the instance's forward call the frozen one. They may come before or after a load."""
    own = part.__dict__
    if "forward" not in own:
        return
    state = part_state(part)
    ours = state.hooked_forward
    if ours is not None and (own["forward"] is ours or any(get() is ours for get, _ in _inner_forwards(part))):
        return
    put = _innermost(part)
    if put is None:
        raise ChangedPartError(
            f"{state.name} was changed after it was frozen: its forward was replaced on the instance, so its graphs "
            "would never run. Undo the patch, or load the pipeline again.",
            state.name,
        )
    state.hooked_forward = FrozenPart.forward.__get__(part)
    put(state.hooked_forward)


def _innermost(module: nn.Module) -> Callable[[Any], None] | None:
    """Return what replaces the module's own forward at the end of a chain of hooks; ``None`` if it is not there."""
    original = getattr(type(module), "_pipevault_original_class", type(module))
    for get, put in _inner_forwards(module):
        function = getattr(get(), "__func__", None)
        if function is original.forward or function is FrozenPart.forward:
            return put
    return None


def _inner_forwards(module: nn.Module) -> Iterator[tuple[Callable[[], Any], Callable[[Any], None]]]:
    """Yield where hooks of accelerate and of diffusers keep the forward that they call."""
    own = module.__dict__
    if "_old_forward" in own:
        yield lambda: own["_old_forward"], lambda forward: own.__setitem__("_old_forward", forward)
    for reference, name in inner_forwards(own.get("_diffusers_hook")):
        yield partial(getattr, reference, name), partial(setattr, reference, name)


def part_state(module: nn.Module) -> PartState:
    return cast(FrozenPart, module)._pipevault_state


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes that a copy takes along: not a forward on the instance, which calls the frozen one."""
    return {k: v for k, v in module.__dict__.items() if k not in {"forward", "_old_forward"}}


def _restore(original: type[nn.Module], attributes: dict[str, Any]) -> nn.Module:
    module = original.__new__(original)
    module.__dict__ = attributes
    return module
