"""Parts that are compiled by hand: ``onediffx.compile_pipe(pipe, backend="inductor")``, ``save_pipe``, ``load_pipe``.

Importing this module registers the backend. Each part freezes the calls that it gets, runs the frozen graph from the
first call on, and has a guard of its own, for no loaded pipeline has one. ``docs/onediff.md`` describes the options.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipevault.cache.guard import WatchedModule, changed_error
from pipevault.cache.keys import PartIdentity
from pipevault.compat.onediff import register_backend
from pipevault.compat.pytorch import compile_mode_options, compile_modes, inductor_option_names
from pipevault.compat.versions import require_inductor
from pipevault.digest import digest_json
from pipevault.errors import ChangedPartError, MissError, NothingFrozenError, SettingsError, WrongMachineError
from pipevault.graphs.freezing import part_device
from pipevault.graphs.inductor import BuildOptions
from pipevault.graphs.part import BACKEND, FrozenPart, freeze_module, part_state, unfrozen
from pipevault.graphs.state import PartOptions, PartState
from pipevault.key import leaf_differences
from pipevault.reading import read_file

_AGAIN = f'compile_pipe(pipe, backend="{BACKEND}")'
_DEFAULTS: Mapping[str, Any] = {
    "on_unfrozen": "compile",
    "weights": "bound",
    "mode": None,
    "memory_format": "preserve_format",
    "dynamic": False,
    "build_config": {},
}
_MEMORY_FORMATS: Mapping[str, Mapping[int, torch.memory_format]] = {
    "preserve_format": {},
    "contiguous_format": {4: torch.contiguous_format, 5: torch.contiguous_format},
    "channels_last": {4: torch.channels_last},
    "channels_last_3d": {5: torch.channels_last_3d},
}
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "on_unfrozen": ("compile", "eager", "error"),
    "weights": ("bound", "baked"),
    "memory_format": tuple(_MEMORY_FORMATS),
}
_LISTED_DIFFERENCES = 4

_COMPILED: weakref.WeakSet[PartState] = weakref.WeakSet()
"""All parts that were compiled by hand and are still there."""


def compile_module(torch_module: nn.Module | None = None, *, options: Any = None) -> Any:
    """Freeze a module, as ``onediff.infer_compiler.compile(module, backend="inductor", options=…)`` asks for.

    ``options`` of this package's own type are taken as they are. Raises :class:`SettingsError` for other ones that
    :func:`read_options` does not know, :class:`~pipevault.errors.CannotFreezeError` for a module that cannot be frozen.
    """
    if torch_module is None:
        return lambda module: compile_module(module, options=options)
    require_inductor()
    if isinstance(options, PartOptions):
        return freeze_module(torch_module, options)
    given = read_options(options)
    if isinstance(torch_module, nn.Module):
        module, formats = unfrozen(torch_module), _MEMORY_FORMATS[given["memory_format"]]
        for tensor in (*module.parameters(), *module.buffers()):
            if (wanted := formats.get(tensor.dim())) is not None:
                tensor.data = tensor.data.to(memory_format=wanted)
    build = BuildOptions(given["weights"], {**compile_mode_options(given["mode"]), **given["build_config"]})
    watch = part_state(torch_module).options.watch if isinstance(torch_module, FrozenPart) else None
    if isinstance(watch, _PartWatch) and watch.build == build and not watch.is_changed():
        is_kept = True  # the graphs of a part that is compiled again are still good
    else:
        watch, is_kept = _PartWatch(build), False
    ours = PartOptions(
        policy=given["on_unfrozen"],
        context=repr(build.to_json()),
        build=build,
        watch=watch,
        freeze_hint="Freeze it with on_unfrozen='compile' and save_pipe",
    )
    part = freeze_module(torch_module, ours)
    _COMPILED.add(part_state(part))
    if isinstance(torch_module, FrozenPart) and not is_kept:
        part_state(part).attach(part_device(part_state(part).module))
    return part


def read_options(options: Any) -> dict[str, Any]:
    """Return every option of the backend as it was given, else its default. Raises :class:`SettingsError` for an option
    or a value that is unknown, and for anything but a mapping.
    """
    given = _mapping(options)
    for name in given:
        if name not in _DEFAULTS:
            raise SettingsError(
                f"The backend {BACKEND!r} has no option {name!r}.{_did_you_mean(str(name), _DEFAULTS)}"
                f" Options: {', '.join(_DEFAULTS)}."
            )
    values = {**_DEFAULTS, **{name: value for name, value in given.items() if value is not None}}
    choices = {**_CHOICES, "mode": compile_modes()} if values["mode"] is not None else _CHOICES
    for name, allowed in choices.items():
        if values[name] not in allowed:
            raise SettingsError(f"The option {name} must be one of {', '.join(allowed)}, not {values[name]!r}.")
    if values["dynamic"] is not False:
        raise SettingsError(
            f"The option dynamic is {values['dynamic']!r}, and each size has a graph of its own, which is frozen when "
            "it is first called. Leave the option out."
        )
    if not isinstance(values["build_config"], Mapping):
        raise SettingsError(
            f"The option build_config must be a mapping of torch._inductor.config, not {values['build_config']!r}."
        )
    if unknown := sorted(set(values["build_config"]) - set(known := inductor_option_names())):
        raise SettingsError(
            f"torch._inductor.config has no field {unknown[0]!r}, which build_config sets."
            + (_did_you_mean(unknown[0], known) or " Leave it out.")
        )
    return values


def _mapping(options: Any) -> Mapping[str, Any]:
    if options is None:
        return {}
    source = "The options"
    if isinstance(options, (str, Path)):
        try:
            text = str(options)
            if not text.lstrip().startswith("{"):
                source = f"The options file {text}"
                text = read_file(Path(text)).decode()
            options = json.loads(text)
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"{source} of the backend {BACKEND!r} cannot be read: {error}. Give a mapping, its JSON, or a "
                "file that holds it."
            ) from error
    if not isinstance(options, Mapping):
        raise SettingsError(
            f"{source} of the backend {BACKEND!r} must be a mapping, not a {type(options).__name__}. "
            f"Options: {', '.join(_DEFAULTS)}."
        )
    return options


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    return "".join(f" Did you mean {close}?" for close in get_close_matches(name, list(known), n=1, cutoff=0.5))


class _PartWatch:
    """Guards one part, as it is for each set of dtypes of its weights: pipelines cast parts for the length of a call.
    It holds the eager module and not the part, so that a dropped pipeline frees its weights at once.
    """

    def __init__(self, build: BuildOptions) -> None:
        self.build = build
        self._watched: dict[frozenset[torch.dtype], WatchedModule] = {}
        self._parameters: list[nn.Parameter] = []
        """The parameters of the part when it was last looked at: listing them takes longer than all the rest."""

    def calling(self, state: PartState) -> None:
        watched = self._watched.get(self._dtypes())
        if watched is None:
            self._watch(state)  # the call will freeze what the part is now
            return
        change = watched.change()
        if change is None:
            return
        if not any(True for _ in state.table):  # nothing was frozen of it yet
            self._watch(state)
        elif change.is_sure:
            raise changed_error(state.name, change.text, _AGAIN)
        else:
            state.trial = partial(watched.settle, state.name, change, freeze_again=_AGAIN)  # must not hold the part

    def is_changed(self) -> bool:
        watched = self._watched.get(self._dtypes())
        return watched is None or watched.change() is not None

    def lacking(self, state: PartState) -> None:
        """A part that the pipeline does not call has no graphs, and ``save_pipe`` skips it. But where no part at all
        has any, it would write an empty folder without a word.
        """
        if not any(slot.kept.document for other in tuple(_COMPILED) for slot in other.table):
            raise NothingFrozenError(
                f"{state.name} has no graphs, and neither has any other part that was compiled by hand, so there is "
                "nothing to save. Run the pipeline first: its calls are frozen as they come.",
                state.name,
            )

    def saving(self, state: PartState) -> Mapping[str, Any]:
        watched = self._watched.get(self._dtypes())
        if watched is not None and (change := watched.change()) is not None:
            raise changed_error(state.name, change.text, _AGAIN)
        return self._factors(state)

    def loading(self, state: PartState, identity: Mapping[str, Any] | None, path: Path) -> None:
        if identity is not None and (differences := leaf_differences(self._factors(state), identity)):
            told = "; ".join(
                f"{difference.factor} is {difference.theirs!r} there and {difference.ours!r} here"
                for difference in differences[:_LISTED_DIFFERENCES]
            )
            more = f"; and {len(differences) - _LISTED_DIFFERENCES} more" if differences[_LISTED_DIFFERENCES:] else ""
            message = (
                f"The graphs of {state.name} in {path} are not for this part: {told}{more}. Make both the same, or "
                "freeze it here: run the pipeline without load_pipe, then save_pipe."
            )
            groups = {difference.factor.partition(".")[0] for difference in differences}
            if groups & {"architecture", "dtype", "weights"}:
                raise ChangedPartError(message, state.name)
            if "machine" in groups:
                raise WrongMachineError(message)
            raise MissError(message, digest_json(dict(identity)).hex, told)
        self._watch(state)

    def _watch(self, state: PartState) -> None:
        self._parameters = list(state.module.parameters())
        self._watched[self._dtypes()] = WatchedModule(state.module)

    def _dtypes(self) -> frozenset[torch.dtype]:
        return frozenset([parameter.dtype for parameter in self._parameters])

    def _factors(self, state: PartState) -> dict[str, Any]:
        device = part_device(state.module)
        identity = PartIdentity.of(state.module, device, backend=BACKEND, build=self.build)
        plain: dict[str, Any] = json.loads(json.dumps(dict(identity.factors)))
        return plain


register_backend(BACKEND, compile_module)
