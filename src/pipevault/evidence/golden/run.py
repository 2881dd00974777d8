"""Goldens recorded and checked: those of a suite, and those of a test for the fixture of the pytest plugin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipevault.cache.keys import execution_device
from pipevault.cache.outcome import Progress
from pipevault.cache.pipeline_cache import PipelineCache
from pipevault.cache.search import open_vault
from pipevault.digest import Digest
from pipevault.errors import PipevaultError, SettingsError, VaultError
from pipevault.evidence.golden.check import Passed, Rules, check_drawn, find_golden
from pipevault.evidence.golden.drawn import Drawn, machine_type, samples_of, seen_latents
from pipevault.evidence.golden.drift import measure_tolerances
from pipevault.evidence.golden.files import Golden, Tolerance, case_folder, machine_types, write_golden
from pipevault.evidence.golden.suite_file import Case, Suite
from pipevault.fingerprint.machine import machine_factors
from pipevault.graphs import parts as graph_parts
from pipevault.runtime.record import RunRecord
from pipevault.runtime.records import record_of
from pipevault.settings import Settings


class SuiteRunner:
    """Draws the cases of a suite with frozen graphs. The pipeline stays open from case to case of one shape."""

    def __init__(
        self,
        suite: Suite,
        *,
        dir: str | Path | None = None,
        mode: str | None = None,
        build_config: Mapping[str, bool | int | float | str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.suite = suite
        self._cache = PipelineCache(dir, mode=mode, level=suite.level, build_config=build_config, progress=progress)
        if self._cache.settings.mode == "off":
            raise SettingsError("Goldens are drawn with frozen graphs: give another mode than 'off'.")
        self._pipe: Any = None
        self._loaded: dict[str, Any] | None = None

    @property
    def goldens(self) -> Path:
        return self.suite.path.with_name(f"{self.suite.path.stem}.goldens")

    def machine(self) -> dict[str, Any]:
        pipe = self._open()
        return machine_factors(execution_device(pipe, graph_parts.find_parts(pipe)))

    def draw(self, case: Case) -> Drawn:
        pipe = self._load(case)
        with seen_latents(pipe) as latents:
            output = pipe(**case.request.call_arguments(pipe), seed=case.request.seed)
        record = record_of(output)
        entry = self._cache.find_entry(Digest(record.key)) if record.key else None
        return Drawn(record, samples_of(output), tuple(latents), entry.key.factors if entry else None)

    def _open(self) -> Any:
        if self._pipe is None:
            self._pipe = self.suite.open()
        return self._pipe

    def _load(self, case: Case) -> Any:
        wanted = case.request.load_arguments(self._open())
        if self._loaded != wanted:
            if self._loaded is not None:  # a model may fill caches at its first call and then have another key
                self._pipe = self._loaded = None
            self._cache.load(self._open(), **wanted)
            self._loaded = wanted
        return self._pipe


def record_suite(
    runner: SuiteRunner, *, names: tuple[str, ...] = (), overwrite: bool = False, measure: bool = False
) -> Iterator[Golden]:
    """Record the cases of these names, all of them for none, and yield each golden once it is written.

    ``measure``: also measure how far they move under the causes of drift, in fresh processes. Nothing is drawn if one
    of them was recorded already and ``overwrite`` is not set: :class:`SettingsError`.
    """
    suite, cases = runner.suite, runner.suite.selected(names)
    folder = runner.goldens / machine_type(runner.machine())
    if not overwrite and (known := [case.name for case in cases if (folder / case.name).exists()]):
        raise SettingsError(
            f"{', '.join(known)} of {suite.path} {'was' if len(known) == 1 else 'were'} recorded already, in {folder}. "
            "Pass --overwrite to record again, or --case for others."
        )
    drawn = {case.name: runner.draw(case) for case in cases}
    tolerances: Mapping[str, Tolerance] = measure_tolerances(suite, drawn) if measure else {}
    for case in cases:
        # The record says on which machine it was drawn, also where drawing itself changed the number of threads.
        path = case_folder(runner.goldens, machine_type(drawn[case.name].record.machine), case.name)
        golden = Golden(path, case.name, drawn[case.name], case.request.to_json(), tolerances.get(case.name))
        write_golden(golden, overwrite=overwrite)
        yield golden


def check_suite(
    runner: SuiteRunner,
    *,
    names: tuple[str, ...] = (),
    other_machine: bool = False,
    other_key: bool = False,
    out: Path | None = None,
) -> Iterator[tuple[str, Passed | PipevaultError]]:
    """Check the cases of these names, all of them for none, against their goldens; yield a result for each.

    Pictures of those that differ go to ``out/<case>``, by default ``<suite stem>.failures/<case>`` next to the suite.
    """
    suite, cases = runner.suite, runner.suite.selected(names)
    failures, machine = out or suite.path.with_name(f"{suite.path.stem}.failures"), runner.machine()
    for case in cases:
        rules = Rules(
            limits=case.limits,
            other_machine=other_machine or suite.other_machine,
            other_key=other_key or suite.other_key,
            record=f"`pipevault golden record {suite.path}`",
            again=f"`pipevault golden record {suite.path} --case {case.name} --overwrite`",
        )
        try:
            golden = find_golden(runner.goldens, case.name, machine, rules)
            yield case.name, check_drawn(golden, runner.draw(case), rules, out=failures / case.name)
        except PipevaultError as error:
            yield case.name, error


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
) -> None:
    """Hold an output to the golden of ``case`` for its machine type; with ``is_recording`` record one that
    is missing.
    """
    drawn = Drawn(record, samples_of(output), factors=_factors(record.key))
    here = machine_type(record.machine)
    if is_recording and (overwrite or here not in machine_types(goldens, case)):
        write_golden(Golden(case_folder(goldens, here, case), case, drawn), overwrite=overwrite)
    else:
        check_drawn(find_golden(goldens, case, record.machine, rules), drawn, rules, out=out)


def _factors(key: str | None) -> Mapping[str, Any] | None:
    """Return the factors of a key, where the vault in force has its entry: they make a message more precise."""
    try:
        vault = open_vault(Settings.resolve(), create=False)
        found = vault.lookup(Digest(key)) if vault is not None and key is not None else None
    except VaultError:
        return None
    return None if found is None else found.key.factors
