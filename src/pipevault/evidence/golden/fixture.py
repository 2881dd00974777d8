"""Goldens from inside a test: the work behind the fixture of the pytest plugin."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipevault.cache.search import open_vault
from pipevault.digest import Digest
from pipevault.errors import VaultError
from pipevault.evidence.golden.check import Passed, Rules, check_drawn, find_golden
from pipevault.evidence.golden.draw import Drawn, samples_of
from pipevault.evidence.golden.files import Golden, case_folder, machine_types, write_golden
from pipevault.evidence.golden.machine import machine_type
from pipevault.evidence.golden.run import SuiteRunner, check_suite, record_suite
from pipevault.evidence.golden.suite_file import read_suite
from pipevault.runtime.record import RunRecord
from pipevault.settings import Settings


def hold(
    output: Any,
    record: RunRecord,
    *,
    goldens: Path,
    case: str,
    rules: Rules,
    out: Path,
    is_recording: bool,
    overwrite: bool,
) -> Passed | Golden:
    """Hold an output to the golden of ``case`` for its machine type; with ``is_recording`` record one that is missing.

    Raises what :func:`find_golden` and :func:`check_drawn` raise. The latents themselves are not in an output, so that
    only their digest is kept.
    """
    drawn = Drawn(record, samples_of(output), factors=_factors(record.key))
    here = machine_type(record.machine)
    if is_recording and (overwrite or here not in machine_types(goldens, case)):
        golden = Golden(case_folder(goldens, here, case), case, drawn)
        write_golden(golden, overwrite=overwrite)
        return golden
    return check_drawn(find_golden(goldens, case, record.machine, rules), drawn, rules, out=out)


def hold_suite(
    path: Path,
    *,
    names: tuple[str, ...],
    dir: str | Path | None,
    rules: Rules,
    out: Path,
    is_recording: bool,
    overwrite: bool,
) -> list[Passed]:
    """Hold the cases of a suite to its goldens; with ``is_recording`` record those that are missing, with ``overwrite``
    all of them. Raises the first error once all cases were looked at.
    """
    suite = read_suite(path)
    runner = SuiteRunner(suite, dir=dir)
    if is_recording:
        here, chosen = machine_type(runner.machine()), [case.name for case in suite.selected(names)]
        wanted = [name for name in chosen if overwrite or here not in machine_types(runner.goldens, name)]
        if wanted:
            list(record_suite(runner, names=tuple(wanted), overwrite=overwrite))
    allowed = {"other_machine": rules.other_machine, "other_key": rules.other_key}
    checked = list(check_suite(runner, names=names, out=out, **allowed))
    if failed := {one.case: one.error for one in checked if one.error is not None}:
        error = next(iter(failed.values()))
        if others := list(failed)[1:]:
            error.args = (f"{error} Failed too: {', '.join(others)}.", *error.args[1:])
        raise error
    return [one.passed for one in checked if one.passed is not None]


def _factors(key: str | None) -> Mapping[str, Any] | None:
    """Return the factors of a key, where the vault in force has its entry: they make a message more precise."""
    try:
        vault = open_vault(Settings.resolve(), create=False)
        found = vault.lookup(Digest(key)) if vault is not None and key is not None else None
    except VaultError:
        return None
    return None if found is None else found.key.factors
