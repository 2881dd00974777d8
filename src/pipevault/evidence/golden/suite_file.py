"""A suite of goldens, a model and the fixed-seed generations to hold it to, and its TOML file.

::

    pipevault_suite = 1
    model = "demo"                # a folder (relative to this file), a repository id, or demo
    dtype = "float32"             # these five may be left out
    device = "cpu"
    pipeline_class = "StableDiffusionPipeline"
    level = "repeatable"
    other_machine = false         # as --other-machine; other_key is as --other-key

    [tolerance]                   # in place of what was measured; a case may have its own
    pixels_max_abs = 3            # uint8 pixels: 0 to 255
    pixels_mean_abs = 0.1
    latents_max_abs = 1e-3
    latents_mean_abs = 1e-4

    [[case]]
    name = "seven"                # unique, also as a name of a folder
    prompt = "a handwritten seven"  # or prompts = ["…", "…"]; neither for a pipeline that takes none
    seed = 7
    steps = 12                    # this and the rest may be left out
    guidance_scale = 3.0
    height = 32
    width = 32
    num_frames = 1
    arguments = { negative_prompt = "blurry" }  # further arguments of the pipeline's call

Cases that differ in size, batch or guidance need graphs of their own, so cases of one shape best stand together.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec

from pipevault.digest import canonical_json
from pipevault.errors import BadSuiteError, SettingsError
from pipevault.evidence.request import Request
from pipevault.files.documents import Format
from pipevault.opening import DTYPES, open_pipeline
from pipevault.reading import read_file
from pipevault.settings import split_level
from pipevault.settings.user_folders import expand_user

SUITE_VERSION = 1
SUITE_MARK = "pipevault_suite"

_OWN_ARGUMENTS = {
    "prompt": "prompt",
    "num_inference_steps": "steps",
    "seed": "seed",
    "generator": "seed",
    **{name: name for name in ("guidance_scale", "height", "width", "num_frames")},
}
"""Arguments of a pipeline that a case has a field for."""

_LAST_SEED = 2**64 - 1
_Text: TypeAlias = Annotated[str, msgspec.Meta(min_length=1)]
_Size: TypeAlias = Annotated[int, msgspec.Meta(ge=1)]
_Finite: TypeAlias = int | Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
_Distance: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=sys.float_info.max)]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The largest distances that pass, in the units of the output: 0 to 255 for uint8 pixels. ``None``: not limited."""

    pixels_max_abs: _Distance | None = None
    pixels_mean_abs: _Distance | None = None
    latents_max_abs: _Distance | None = None
    latents_mean_abs: _Distance | None = None

    def over(self, base: Limits) -> Limits:
        """Return these limits, and those of ``base`` where there is none here."""
        return Limits(**{**base.to_json(), **self.to_json()})

    def to_json(self) -> dict[str, float]:
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, table: Any) -> Limits:
        return msgspec.convert(table, cls)


@dataclass(frozen=True)
class Case:
    """One generation of a suite. ``name`` is safe as the name of a folder."""

    name: str
    request: Request
    limits: Limits


class _Case(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}(?<!\.)\Z")]
    seed: Annotated[int, msgspec.Meta(ge=0)]
    prompt: str | None = None
    prompts: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)] | None = None
    steps: _Size | None = None
    guidance_scale: _Finite | None = None
    height: _Size | None = None
    width: _Size | None = None
    num_frames: _Size | None = None
    arguments: dict[str, Any] = msgspec.field(default_factory=dict)
    tolerance: Limits = Limits()


class _Head(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: _Text
    dtype: str | None = None
    device: _Text | None = None
    pipeline_class: _Text | None = None
    level: str | None = None
    other_machine: bool = False
    other_key: bool = False


class _File(_Head, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pipevault_suite: int
    case: Annotated[list[_Case], msgspec.Meta(min_length=1)]
    tolerance: Limits = Limits()


class Suite(_Head, frozen=True, kw_only=True):
    """A suite as it was read. ``level`` is ``None`` where it follows the settings."""

    path: Path
    cases: tuple[Case, ...]

    def selected(self, names: tuple[str, ...]) -> tuple[Case, ...]:
        """Return the cases of these names, all of them for none. :class:`SettingsError` for a name that no case has."""
        known = [case.name for case in self.cases]
        if unknown := [name for name in names if name not in known]:
            raise SettingsError(f"{self.path} has no case {unknown[0]!r}. Its cases: {', '.join(known)}.")
        return tuple(case for case in self.cases if not names or case.name in names)

    def open(self) -> Any:
        return open_pipeline(self.model, dtype=self.dtype, device=self.device, pipeline_class=self.pipeline_class)


_FORMAT = Format(
    _File,
    SUITE_MARK,
    SUITE_VERSION,
    damaged=lambda found: BadSuiteError(
        f"The suite {found.source} cannot be used: {found.what}. Correct it.", found.field
    ),
    newer=lambda found: BadSuiteError(f"The suite {found} Upgrade pipevault.", found.field),
)


def read_suite(path: str | Path) -> Suite:
    """Read the suite in a TOML file. :class:`BadSuiteError` names the field that is wrong, as in ``case[1].seed``."""
    path = Path(path)
    suite = _FORMAT.check(_parsed(path), path)
    if suite.dtype is not None and suite.dtype not in DTYPES:
        raise _FORMAT.bad(path, "dtype", f"expected one of {', '.join(DTYPES)}, got {suite.dtype!r}")
    if suite.level is not None:
        try:
            split_level(suite.level)
        except SettingsError as error:
            raise _FORMAT.bad(path, "level", str(error).removesuffix(".")) from error
    # A folder next to the suite is meant before one in the current folder, wherever the suite is run from.
    folder = path.parent / expand_user(suite.model)
    model = str(folder) if folder.is_dir() else suite.model
    cases: list[Case] = []
    places: dict[str, int] = {}
    for index, case in enumerate(suite.case):
        _check_case(case, path, f"case[{index}]")
        if (first := places.setdefault(case.name.casefold(), index)) != index:
            raise _FORMAT.bad(path, f"case[{index}].name", f"{case.name!r} is the name of case[{first}] too")
        given = {item.name: getattr(case, item.name) for item in fields(Request) if item.name != "prompts"}
        prompts = (case.prompt,) if case.prompt is not None else case.prompts or ()
        request = Request(prompts=prompts, **given).with_defaults_of(model)
        cases.append(Case(case.name, request, case.tolerance.over(suite.tolerance)))
    head = {name: getattr(suite, name) for name in _Head.__struct_fields__}
    return Suite(path=path, cases=tuple(cases), **{**head, "model": model})


def _parsed(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    if not path.is_file():
        raise BadSuiteError(f"No file {path}. Give the TOML file of a suite.", "")
    try:
        return tomllib.loads(read_file(path).decode("utf-8"))
    except (OSError, ValueError) as error:  # bad UTF-8 and bad TOML are both ValueErrors
        raise BadSuiteError(f"The suite {path} cannot be read: {error}. Correct it.", "") from error


def _check_case(case: _Case, path: Path, field: str) -> None:
    if case.seed > _LAST_SEED:
        raise _FORMAT.bad(path, f"{field}.seed", f"expected a whole number from 0 to 2**64 - 1, got {case.seed}")
    if case.prompt is not None and case.prompts is not None:
        raise _FORMAT.bad(path, f"{field}.prompts", "it is given together with `prompt`; give one of them")
    for name, value in case.arguments.items():
        if name in _OWN_ARGUMENTS:
            raise _FORMAT.bad(path, f"{field}.arguments.{name}", f"it has a field of its own, `{_OWN_ARGUMENTS[name]}`")
        try:
            canonical_json(value)
        except (TypeError, ValueError) as error:
            raise _FORMAT.bad(path, f"{field}.arguments.{name}", f"expected plain JSON: {error}") from error
