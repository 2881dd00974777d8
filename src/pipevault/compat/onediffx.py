"""onediffx: the parts that it lists, and its ``compile_pipe``, ``save_pipe`` and ``load_pipe`` on those parts alone.

``compile_pipe`` also casts SDXL's float16 VAE for good and patches the image processor; ``save_pipe`` may write nothing
without a word, ``load_pipe`` skips what is missing. So they are given a stand-in that holds the parts and nothing else,
and what they did is looked at afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipevault.errors import CannotFreezeError, CorruptEntryError, NothingFrozenError

_IGNORED = ("image_processor",)


def listed_parts() -> tuple[str, ...]:
    """The parts that ``compile_pipe`` compiles, ``save_pipe`` saves and ``load_pipe`` loads, by dotted name."""
    from onediffx.compilers.diffusion_pipeline_compiler import _PARTS

    return tuple(_PARTS)


def compile_parts(parts: Mapping[str, Any], *, backend: str, options: Any) -> dict[str, Any]:
    """Return each of ``parts`` compiled by ``backend``; ``compile`` takes those that ``compile_pipe`` does not list."""
    import onediffx
    from onediff.infer_compiler import compile as onediff_compile

    known = listed_parts()
    listed = {name: module for name, module in parts.items() if name in known}
    pipe = _stand_in(listed)
    if listed:
        onediffx.compile_pipe(pipe, backend=backend, options=options)
    others = {name: module for name, module in parts.items() if name not in known}
    return {
        **{name: attrgetter(name)(pipe) for name in listed},
        **{name: onediff_compile(module, backend=backend, options=options) for name, module in others.items()},
    }


def check_deployable(parts: Mapping[str, Any]) -> None:
    """Raise :class:`CannotFreezeError` for a compiled part that ``save_pipe`` or ``load_pipe`` cannot handle."""
    from onediff.infer_compiler import DeployableModule

    for name, part in parts.items():
        if not isinstance(part, DeployableModule):
            what = f"its backend made a {type(part).__name__} of it, which is not a DeployableModule"
        elif lacking := [method for method in ("save_graph", "load_graph") if not hasattr(type(part), method)]:
            what = f"the {type(part).__name__} that its backend made of it has no {' and no '.join(lacking)}"
        else:
            continue
        raise CannotFreezeError(f"{name} cannot be kept: {what}. Use a backend whose graphs can be saved.", name)


def save_parts(parts: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """Save the compiled ``parts`` that were called, by ``save_pipe``; return their names. Raises
    :class:`NothingFrozenError` if there is none, or if a part that has a graph was not written.
    """
    import onediffx

    check_deployable(parts)
    called = tuple(name for name, part in parts.items() if is_compiled(part))
    if not called:
        raise NothingFrozenError(
            f"None of {', '.join(parts) or 'the parts'} has a graph, so there is nothing to save. "
            "Run the pipeline first."
        )
    onediffx.save_pipe(_stand_in({name: parts[name] for name in called}), dir=str(folder), ignores=_IGNORED)
    if missing := [name for name in called if not (folder / name).exists()]:
        raise NothingFrozenError(
            f"save_pipe wrote nothing for {', '.join(missing)}, which has a graph. "
            f"It saves {', '.join(listed_parts())}.",
            missing[0],
        )
    return called


def load_parts(parts: Mapping[str, Any], folder: Path, names: Iterable[str]) -> None:
    """Load the graphs of ``names`` into the compiled ``parts``, by ``load_pipe``. Raises :class:`CorruptEntryError` for
    one that is missing in ``folder``, is not a part, or has no graph afterwards.
    """
    import onediffx

    names = tuple(names)
    if missing := [name for name in names if name not in parts or not (folder / name).exists()]:
        raise CorruptEntryError(
            f"{folder} has no graph of {', '.join(missing)}. Save the pipeline again.", folder / missing[0]
        )
    chosen = {name: parts[name] for name in names}
    check_deployable(chosen)
    onediffx.load_pipe(_stand_in(chosen), dir=str(folder), ignores=_IGNORED)
    if unloaded := [name for name, part in chosen.items() if not is_compiled(part)]:
        raise CorruptEntryError(
            f"load_pipe left {', '.join(unloaded)} without a graph. Save the pipeline again.", folder / unloaded[0]
        )


def is_compiled(part: Any) -> bool:
    """Return whether a compiled part has a graph: what ``save_pipe`` asks."""
    return part._deployable_module_dpl_graph is not None and bool(part.get_graph().is_compiled)


def _stand_in(parts: Mapping[str, Any]) -> Any:
    pipe = SimpleNamespace()
    for name, module in parts.items():
        owner = pipe
        *path, attribute = name.split(".")
        for step in path:
            owner = vars(owner).setdefault(step, SimpleNamespace())
        setattr(owner, attribute, module)
    return pipe
