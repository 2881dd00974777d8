"""The check of a generation against its golden.

For the same key the pixels must be equal, byte for byte. Where the machine type or the key is another, equal pixels
pass too; others only if that was allowed, and then within limits that were measured where the golden was recorded, or
that the suite gives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipevault import errors
from pipevault.evidence.files import Array, write_data
from pipevault.evidence.golden.drawn import (
    Drawn,
    Sample,
    build_differences,
    listed,
    machine_differences,
    machine_type,
    run_differences,
)
from pipevault.evidence.golden.files import (
    Golden,
    case_folder,
    machine_types,
    read_golden,
    write_picture,
)
from pipevault.evidence.golden.suite_file import Limits
from pipevault.evidence.metrics import Distance, distance, heat_map
from pipevault.report.page import png_bytes

KINDS = ("expected", "actual", "difference")
_OURS = re.compile(rf"({'|'.join(KINDS)})(-\d+)?\.png")


@dataclass(frozen=True)
class Rules:
    """The differences that are allowed, and how a message tells to record or to allow more."""

    limits: Limits = field(default_factory=Limits)
    other_machine: bool = False
    other_key: bool = False
    record: str = "`pipevault golden record`"
    again: str = "`pipevault golden record --overwrite`"
    measure: str = "--measure-tolerance"
    allow_machine: str = "--other-machine"
    allow_key: str = "--other-key"


@dataclass(frozen=True)
class Passed:
    """A check that passed: ``status`` is ``equal`` or ``within tolerance``; ``differences`` are those of the run."""

    golden: Path
    status: str
    differences: tuple[str, ...] = ()
    pixels: Distance | None = None
    latents: Distance | None = None


def find_golden(goldens: Path, case: str, machine: Mapping[str, Any], rules: Rules) -> Golden:
    """Find the golden of a case for this machine type, or, if ``rules`` allow it, the nearest of another."""
    here = machine_type(machine)
    known = machine_types(goldens, case)
    if here in known:
        return read_golden(case_folder(goldens, here, case))
    if not known:
        raise errors.NoGoldenError(f"Nothing was recorded for {case!r} in {goldens}. Record it with {rules.record}.")
    others = [read_golden(case_folder(goldens, name, case)) for name in known]
    golden = min(others, key=lambda other: (len(machine_differences(other.record.machine, machine)), other.path))
    differences = machine_differences(golden.record.machine, machine)
    what = (
        f"{case!r} has no golden of this machine type, {here}; the nearest, {golden.path.parent.name}, differs in "
        f"{listed(differences)}."
    )
    if not rules.other_machine:
        raise errors.OtherMachineError(
            f"{what} Record one here with {rules.record}, or compare within its measured tolerance with "
            f"{rules.allow_machine}.",
            differences,
        )
    if not _limits(golden, rules).to_json():
        raise errors.OtherMachineError(
            f"{what} It has no tolerance to compare within: record it there with {rules.measure}, or give limits of "
            "your own.",
            differences,
        )
    return golden


def check_drawn(golden: Golden, drawn: Drawn, rules: Rules, *, out: Path) -> Passed:
    """Hold ``drawn`` to ``golden``; if it differs, leave pictures in the folder ``out``."""
    _clear_pictures(out)
    _check_weights(golden, drawn)
    is_other_machine = machine_type(drawn.record.machine) != golden.machine_type
    is_other_key = golden.record.key != drawn.record.key
    differences = _differences(golden, drawn)
    pairs = zip(golden.drawn.samples, drawn.samples, strict=False)
    equal = [_form(one) == _form(other) and one.tobytes() == other.tobytes() for one, other in pairs]
    wrong = [index for index, is_equal in enumerate(equal) if not is_equal]
    wrong += range(len(equal), max(len(golden.drawn.samples), len(drawn.samples)))
    if not wrong:
        return Passed(golden.path, "equal", differences)
    limits = _limits(golden, rules)
    is_allowed = rules.other_machine if is_other_machine else is_other_key and rules.other_key
    same_forms = list(map(_form, golden.drawn.samples)) == list(map(_form, drawn.samples))
    if is_allowed and limits.to_json() and same_forms:
        found = distance_of(golden.drawn, drawn)
        over = _over(found, limits)
        if not over:
            return Passed(golden.path, "within tolerance", differences, found["pixels"], found.get("latents"))
        why = f"It is beyond the tolerance: {'; '.join(over)}."
    else:
        why = _why(golden, drawn, rules, is_other_machine=is_other_machine, is_other_key=is_other_key)
    if differences:
        why += f" Differences of the run: {listed(differences)}."
    if not (golden.record.weights and drawn.record.weights):
        why += " Whether the weights changed cannot be told: no digests of them were recorded."
    _write_failure(out, golden, drawn, wrong)
    raise errors.DifferentOutputError(
        f"{golden.case!r} is not what its golden {golden.path} expects: {_described(golden, drawn, wrong)}. {why} "
        f"The pictures expected, actual and difference are in {out}."
    )


def distance_of(golden: Drawn, drawn: Drawn) -> dict[str, Distance]:
    """Measure over all ``pixels`` of two runs, and over all ``latents`` where both have them."""
    found = {"pixels": _distance(golden.samples, drawn.samples)}
    if golden.latents and drawn.latents:
        found["latents"] = _distance(golden.latents, drawn.latents)
    return found


def _distance(expected: Sequence[Sample], actual: Sequence[Sample]) -> Distance:
    if len(expected) != len(actual):
        raise errors.NotComparableError(f"{len(expected)} outputs cannot be compared with {len(actual)}.")
    found = [distance(np.asarray(one), np.asarray(other)) for one, other in zip(expected, actual, strict=True)]
    worst = max(found, key=lambda one: (one.max_abs, one.mean_abs))
    return replace(
        worst,
        mean_abs=max(one.mean_abs for one in found),
        differing_share=max(one.differing_share for one in found),
    )


def _over(found: Mapping[str, Distance], limits: Limits) -> list[str]:
    over, applied = [], 0
    for name, limit in limits.to_json().items():
        kind, _, measure = name.partition("_")
        if kind in found:
            applied += 1
            if not (value := getattr(found[kind], measure)) <= limit:
                over.append(f"{kind} {measure} is {value:.4g}, the limit {limit:.4g}")
    return over if applied else [f"no limit is given for {', '.join(found)}, which is all that was seen"]


def _limits(golden: Golden, rules: Rules) -> Limits:
    return rules.limits.over(golden.tolerance.limits if golden.tolerance else Limits())


def _check_weights(golden: Golden, drawn: Drawn) -> None:
    theirs, ours = golden.record.weights, drawn.record.weights
    parts = tuple(name for name in sorted(theirs.keys() & ours.keys()) if theirs[name] != ours[name])
    if parts:
        raise errors.ChangedWeightsError(
            f"{golden.case!r} was recorded with other weights of {', '.join(parts)}: "
            f"{'; '.join(f'{name} {theirs[name][:12]} there, {ours[name][:12]} here' for name in parts)}. Open the "
            "model as it was, or record what these weights draw.",
            parts,
        )


def _differences(golden: Golden, drawn: Drawn) -> tuple[str, ...]:
    builds: tuple[str, ...] = ()
    if golden.record.key != drawn.record.key:
        theirs, ours = (key[:12] if key else "none" for key in (golden.record.key, drawn.record.key))
        builds = build_differences(golden.drawn, drawn) or (f"key: {theirs} in the golden, {ours} here",)
    elif golden.record.graphs != drawn.record.graphs:
        builds = ("other graphs ran, or they were frozen again",)
    return (*run_differences(golden.record, drawn.record), *builds)


def _why(golden: Golden, drawn: Drawn, rules: Rules, *, is_other_machine: bool, is_other_key: bool) -> str:
    again = f"If this is what it should draw, record it again with {rules.again}."
    if run_differences(golden.record, drawn.record):
        return f"The call is not the one that was recorded. {again}"
    if is_other_machine:
        return again
    if is_other_key:
        bare = "" if _limits(golden, rules).to_json() else f" (this golden has none yet; see {rules.measure})"
        return f"The key is another. {again} To compare within a tolerance instead, pass {rules.allow_key}{bare}."
    return f"The key is the same. {again}"


def _described(golden: Golden, drawn: Drawn, wrong: Sequence[int]) -> str:
    expected, actual = golden.drawn.samples, drawn.samples
    texts = [f"{len(wrong)} of {len(expected)} samples differ"]
    if len(expected) != len(actual):
        texts = [f"{len(expected)} samples were expected, {len(actual)} came out"]
    both = [(expected[index], actual[index]) for index in wrong if index < min(len(expected), len(actual))]
    forms = ((_form(one), _form(other)) for one, other in both)
    if unlike := next(((one, other) for one, other in forms if one != other), None):
        texts.append(f"{unlike[0]} were expected and {unlike[1]} came out")
    elif both:
        with suppress(errors.MissingExtraError):  # the outputs differ all the same; how far needs the extra
            found = _distance([one for one, _ in both], [other for _, other in both])
            texts.append(
                f"{found.differing_share:.1%} of the pixels, by {found.max_abs:.4g} at most and {found.mean_abs:.4g} "
                "on average"
            )
    for name, verb in (("noise", "is"), ("latents", "are")):
        before, now = golden.record.results.get(name), drawn.record.results.get(name)
        if before and now:
            texts.append(f"the {name} {verb} {'equal' if before == now else 'other'}")
    return ", ".join(texts)


def _form(sample: Sample) -> str:
    if isinstance(sample, Image.Image):
        return f"{sample.width}x{sample.height} pixels of mode {sample.mode}"
    array: Array = np.asarray(sample)
    return f"{array.dtype} arrays of shape {array.shape}"


def _clear_pictures(folder: Path) -> None:
    """Take away what an earlier failed check left in ``folder``, and nothing else."""
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if _OURS.fullmatch(path.name):
            path.unlink()
    with suppress(OSError):  # something else is in it
        folder.rmdir()


def _write_failure(folder: Path, golden: Golden, drawn: Drawn, indexes: list[int]) -> None:
    """Write pictures of the samples ``indexes``: the golden's, what came out, and a heat map where both have one size.

    Arrays are shown in shades of grey, their channels side by side.
    """
    several = max(len(golden.drawn.samples), len(drawn.samples)) > 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for index in indexes:
            number = f"-{index}" if several else ""
            files = [folder / f"{kind}{number}.png" for kind in KINDS]
            runs = [(run, file) for run, file in zip((golden.drawn, drawn), files, strict=False)]
            samples = [(run.samples[index], run, file) for run, file in runs if index < len(run.samples)]
            for sample, run, file in samples:
                if isinstance(sample, Image.Image):
                    write_picture(sample, file, run.record, index)
                else:
                    write_data(file, png_bytes(_in_grey(sample, like=samples[0][0])))
            if len(samples) == 2:
                with suppress(errors.NotComparableError):  # of another size or type, which the message says
                    write_data(files[2], png_bytes(heat_map(_plane(samples[0][0]), _plane(samples[1][0]))))
    except OSError as error:
        raise errors.CannotSaveError(
            f"The pictures of a failed check could not be written to {folder}: {error.strerror or error}. Give "
            "another folder.",
            folder,
        ) from error


def _plane(sample: Sample) -> Array:
    """Return an array as rows and columns, one channel next to the other; a picture as it is."""
    array = np.asarray(sample)
    if isinstance(sample, Image.Image) or array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3, 4)):
        return array
    if array.ndim < 2:
        return array.reshape(1, -1)
    return np.concatenate(list(array.reshape(-1, *array.shape[-2:])), axis=1)


def _in_grey(array: Array, *, like: Sample) -> Image.Image:
    plane, scale = (np.nan_to_num(np.asarray(one).astype(np.float64)) for one in (_plane(array), like))
    low, high = float(scale.min()), float(scale.max())
    shades = np.clip((plane - low) / ((high - low) or 1.0), 0.0, 1.0)
    return Image.fromarray(np.rint(shades * 255).astype(np.uint8).squeeze())
