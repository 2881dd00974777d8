"""onediffx: the parts that it lists, and its ``compile_pipe`` on those parts alone."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any


def listed_parts() -> tuple[str, ...]:
    """The parts that ``compile_pipe`` compiles, ``save_pipe`` saves and ``load_pipe`` loads, by dotted name."""
    from onediffx.compilers.diffusion_pipeline_compiler import _PARTS

    return tuple(_PARTS)


def compile_parts(parts: Mapping[str, Any], *, backend: str, options: Any) -> dict[str, Any]:
    """Return each of ``parts``, by dotted name, compiled by ``backend``.

    ``compile_pipe`` does more than compile: it casts SDXL's float16 VAE for good and patches the image processor. So it
    is given a stand-in that holds the parts and nothing else. Parts that it does not list are compiled one by one with
    OneDiff's ``compile``.
    """
    import onediffx
    from onediff.infer_compiler import compile as onediff_compile

    compiled: dict[str, Any] = {}
    known = listed_parts()
    listed = {name: module for name, module in parts.items() if name in known}
    if listed:
        stand_in = SimpleNamespace()
        for name, module in listed.items():
            owner: Any = stand_in
            *path, attribute = name.split(".")
            for step in path:
                if not hasattr(owner, step):
                    setattr(owner, step, SimpleNamespace())
                owner = getattr(owner, step)
            setattr(owner, attribute, module)
        onediffx.compile_pipe(stand_in, backend=backend, options=options)
        for name in listed:
            owner = stand_in
            for step in name.split("."):
                owner = getattr(owner, step)
            compiled[name] = owner
    for name, module in parts.items():
        if name not in listed:
            compiled[name] = onediff_compile(module, backend=backend, options=options)
    return compiled
