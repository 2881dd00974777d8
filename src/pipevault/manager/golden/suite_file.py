"""Reading the TOML file of a suite of goldens.

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

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from pipevault.errors import BadSuiteError, SettingsError
from pipevault.manager.golden.suite import Case, Limits, Suite, is_number
from pipevault.manager.request import Request
from pipevault.opening import DTYPES
from pipevault.reading import read_file
from pipevault.settings import split_level
from pipevault.settings.user_folders import expand_user

SUITE_VERSION = 1
SUITE_MARK = "pipevault_suite"

_SUITE_FIELDS = (SUITE_MARK, "model", "dtype", "device", "pipeline_class", "level", "other_machine", "other_key")
_REQUEST_SIZES = ("steps", "height", "width", "num_frames")
_CASE_FIELDS = ("name", "prompt", "prompts", "seed", *_REQUEST_SIZES, "guidance_scale", "arguments", "tolerance")
_OWN_ARGUMENTS = {
    "prompt": "prompt",
    "num_inference_steps": "steps",
    "seed": "seed",
    "generator": "seed",
    **{name: name for name in ("guidance_scale", "height", "width", "num_frames")},
}
"""Arguments of a pipeline that a case has a field for."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}(?<!\.)")
_LAST_SEED = 2**64 - 1


def read_suite(path: str | Path) -> Suite:
    """The suite in a TOML file. :class:`BadSuiteError` names the field that cannot be used, as in ``case[1].seed``."""
    path = Path(path)
    return _Reader(path).suite(_parsed(path))


def _parsed(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    if not path.is_file():
        raise BadSuiteError(f"There is no file {path}. Give the TOML file of a suite.", "")
    try:
        return tomllib.loads(read_file(path).decode("utf-8"))
    except (OSError, ValueError) as error:  # what is no UTF-8 and what is no TOML are both ValueErrors
        raise BadSuiteError(f"The suite {path} cannot be read: {error}. Correct it.", "") from error


class _Reader:
    def __init__(self, path: Path) -> None:
        self._path = path

    def suite(self, table: Mapping[str, Any]) -> Suite:
        self._check_version(table)
        self._check_names(table, (*_SUITE_FIELDS, "tolerance", "case"), "")
        model = self._model(self._text(table, "model", "", required=True))
        limits = self._limits(table, "")
        return Suite(
            path=self._path,
            model=model,
            dtype=self._one_of(table, "dtype", DTYPES),
            device=self._text(table, "device", ""),
            pipeline_class=self._text(table, "pipeline_class", ""),
            level=self._level(table),
            other_machine=self._flag(table, "other_machine"),
            other_key=self._flag(table, "other_key"),
            cases=self._cases(table, model, limits),
        )

    def _fail(self, field: str, what: str) -> NoReturn:
        raise BadSuiteError(f"Field {field!r} of the suite {self._path} {what}. Correct the suite.", field)

    def _check_version(self, table: Mapping[str, Any]) -> None:
        version = table.get(SUITE_MARK)
        if version is None:
            self._fail(SUITE_MARK, f"is missing; a suite of this version begins with {SUITE_MARK} = {SUITE_VERSION}")
        if not _is_whole(version) or version < 1:
            self._fail(SUITE_MARK, f"is {version!r}, which is no version")
        if version > SUITE_VERSION:
            raise BadSuiteError(
                f"Field {SUITE_MARK!r} of the suite {self._path} is {version}; this pipevault knows up to "
                f"{SUITE_VERSION}. Upgrade pipevault.",
                SUITE_MARK,
            )

    def _check_names(self, table: Mapping[str, Any], known: tuple[str, ...], prefix: str) -> None:
        if unknown := next((name for name in table if name not in known), None):
            self._fail(f"{prefix}{unknown}", f"is unknown; fields: {', '.join(known)}")

    def _model(self, name: str) -> str:
        """A folder beside the suite is meant before one in the current folder, wherever the suite is run from."""
        beside = self._path.parent / expand_user(name)
        return str(beside) if beside.is_dir() else name

    def _level(self, table: Mapping[str, Any]) -> str | None:
        level = self._text(table, "level", "")
        if level:
            try:
                split_level(level)
            except SettingsError as error:
                raise BadSuiteError(f"Field 'level' of the suite {self._path}: {error}", "level") from error
        return level or None

    def _limits(self, table: Mapping[str, Any], prefix: str) -> Limits:
        given = self._table(table, "tolerance", prefix)
        try:
            return Limits.from_json(given)
        except ValueError as error:
            self._fail(f"{prefix}tolerance.{error.args[0]}", error.args[1])

    def _cases(self, table: Mapping[str, Any], model: str, limits: Limits) -> tuple[Case, ...]:
        given = table.get("case")
        if not isinstance(given, list) or not given or not all(isinstance(item, dict) for item in given):
            self._fail("case", "is missing; a suite has one or more tables [[case]]")
        cases = [self._case(item, f"case[{index}].", model, limits) for index, item in enumerate(given)]
        places: dict[str, int] = {}
        for index, case in enumerate(cases):
            if (first := places.setdefault(case.name.casefold(), index)) != index:
                self._fail(f"case[{index}].name", f"is {case.name!r}, which is the name of case[{first}] too")
        return tuple(cases)

    def _case(self, table: Mapping[str, Any], prefix: str, model: str, limits: Limits) -> Case:
        self._check_names(table, _CASE_FIELDS, prefix)
        name = self._text(table, "name", prefix, required=True)
        if not _NAME.fullmatch(name):
            self._fail(f"{prefix}name", f"is {name!r}; it must be safe as a file name: letters, digits, - _ and .")
        request = Request(
            prompts=self._prompts(table, prefix),
            seed=self._seed(table, prefix),
            guidance_scale=self._guidance_scale(table, prefix),
            arguments=self._arguments(table, prefix),
            **{size: self._size(table, size, prefix) for size in _REQUEST_SIZES},
        )
        return Case(name, request.with_defaults_of(model), self._limits(table, prefix).over(limits))

    def _prompts(self, table: Mapping[str, Any], prefix: str) -> tuple[str, ...]:
        if "prompt" in table and "prompts" in table:
            self._fail(f"{prefix}prompts", "stands beside 'prompt'; give one of them")
        if "prompt" in table:
            return (self._text(table, "prompt", prefix),)
        prompts = table.get("prompts", [])
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            self._fail(f"{prefix}prompts", "is no list of texts")
        if "prompts" in table and not prompts:
            self._fail(f"{prefix}prompts", "is empty; leave it out for a pipeline that takes no prompt")
        return tuple(prompts)

    def _seed(self, table: Mapping[str, Any], prefix: str) -> int:
        seed = table.get("seed")
        if seed is None:
            self._fail(f"{prefix}seed", "is missing; a golden needs a fixed seed")
        if not _is_whole(seed) or not 0 <= seed <= _LAST_SEED:
            self._fail(f"{prefix}seed", f"is {seed!r}; a whole number from 0 to 2**64 - 1 is needed")
        return int(seed)

    def _size(self, table: Mapping[str, Any], name: str, prefix: str) -> int | None:
        size = table.get(name)
        if size is not None and (not _is_whole(size) or size < 1):
            self._fail(f"{prefix}{name}", f"is {size!r}; a whole number above 0 is needed")
        return size

    def _guidance_scale(self, table: Mapping[str, Any], prefix: str) -> float | None:
        scale = table.get("guidance_scale")
        if scale is not None and not is_number(scale):
            self._fail(f"{prefix}guidance_scale", f"is {scale!r}; a number is needed")
        return scale

    def _arguments(self, table: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        arguments = self._table(table, "arguments", prefix)
        for name, value in arguments.items():
            field = f"{prefix}arguments.{name}"
            if name in _OWN_ARGUMENTS:
                self._fail(field, f"has a field of its own: {_OWN_ARGUMENTS[name]}")
            if not _is_plain(value):
                self._fail(field, f"is {value!r}; text, numbers that are finite, true, false, lists and tables may be")
        return arguments

    def _table(self, table: Mapping[str, Any], name: str, prefix: str) -> dict[str, Any]:
        value = table.get(name, {})
        if not isinstance(value, dict):
            self._fail(f"{prefix}{name}", "is no table")
        return value

    def _text(self, table: Mapping[str, Any], name: str, prefix: str, *, required: bool = False) -> Any:
        """Text, or ``None`` where it may be left out and is."""
        value = table.get(name)
        if value is None and required:
            self._fail(f"{prefix}{name}", "is missing")
        if value is not None and (not isinstance(value, str) or (not value and name != "prompt")):
            self._fail(f"{prefix}{name}", f"is {value!r}; text is needed")
        return value

    def _one_of(self, table: Mapping[str, Any], name: str, known: tuple[str, ...]) -> str | None:
        value: str | None = self._text(table, name, "")
        if value is not None and value not in known:
            self._fail(name, f"is {value!r}; one of {', '.join(known)} is needed")
        return value

    def _flag(self, table: Mapping[str, Any], name: str) -> bool:
        value = table.get(name, False)
        if not isinstance(value, bool):
            self._fail(name, f"is {value!r}; true or false is needed")
        return value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return isinstance(value, (bool, str)) or is_number(value)
