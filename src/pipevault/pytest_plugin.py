"""The pytest plugin: the fixture ``pipevault_golden`` holds what a loaded pipeline draws to a golden next to the test.

::

    def test_seven(pipe, pipevault_golden):
        pipevault_golden(pipe("a handwritten seven", seed=7), "seven")

``pytest --pipevault-golden-record`` records what is missing. The goldens are in ``goldens/<test file>/`` next to
the test file, a folder for each machine type. Nothing of torch is imported before a test uses the fixture.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipevault.errors import PipevaultError, SettingsError

if TYPE_CHECKING:
    from pipevault.evidence.golden.check import Rules
    from pipevault.runtime.record import RunRecord

GOLDENS_FOLDER = "goldens"
_DIGEST_LENGTH = 8


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pipevault", "goldens of diffusion pipelines")
    flags = {
        "record": "Record goldens that are missing; check the others.",
        "overwrite": "Record all goldens again.",
        "other-machine": "With no golden of this machine type, compare with another's within a tolerance.",
        "other-key": "With a golden of another key (other versions), compare within a tolerance.",
    }
    for name, text in flags.items():
        group.addoption(f"--pipevault-golden-{name}", action="store_true", help=text)
    group.addoption(
        "--pipevault-golden-out",
        metavar="FOLDER",
        help="Where the pictures of failed checks go, a folder for each test. Default: the test's tmp_path.",
    )


class GoldenFixture:
    """The fixture ``pipevault_golden``. Its errors are those of ``pipevault golden check``."""

    def __init__(self, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        self._config = request.config
        self._test_file = request.path
        self._test = request.node.nodeid.partition("::")[2]
        self._tmp_path = tmp_path
        self._used: set[str] = set()

    def __call__(
        self,
        output: Any,
        name: str = "output",
        *,
        record: RunRecord | None = None,
        tolerance: Mapping[str, float] | None = None,
    ) -> None:
        """Hold ``output``, what a loaded pipeline returned, to the golden of this test with this ``name``.

        ``output`` may be a list of pictures; then ``record`` is ``pipevault.record_of`` of what they come from.
        ``tolerance`` has the limits for another machine type or key, where a pytest option allows them:
        ``{"pixels_max_abs": 3}``.
        """
        __tracebackhide__ = True
        from pipevault.evidence.golden import run as goldens
        from pipevault.runtime.records import record_of

        if name in self._used:
            raise SettingsError(f"This test used the golden {name!r} already. Give each output a name of its own.")
        self._used.add(name)
        case = _file_name(f"{self._test}-{name}")
        out = self._tmp_path / "pipevault-golden" / case
        if folder := self._config.getoption("--pipevault-golden-out"):
            out = Path(self._config.invocation_params.dir, folder, self._test_file.stem, case)
        overwrite = self._flag("overwrite")
        try:
            goldens.hold(
                output,
                record or record_of(output),
                goldens=self._test_file.parent / GOLDENS_FOLDER / self._test_file.stem,
                case=case,
                rules=self._rules(tolerance or {}),
                out=out,
                is_recording=overwrite or self._flag("record"),
                overwrite=overwrite,
            )
        except PipevaultError as error:  # it says it all, so its traceback is not shown
            raise error.with_traceback(None) from None

    def _flag(self, name: str) -> bool:
        return bool(self._config.getoption(f"--pipevault-golden-{name}"))

    def _rules(self, tolerance: Mapping[str, float]) -> Rules:
        from pipevault.evidence.golden.check import Rules
        from pipevault.evidence.golden.suite_file import Limits

        try:
            limits = Limits.from_json(tolerance)
        except ValueError as error:
            raise SettingsError(f"tolerance: {error}.") from error
        return Rules(
            limits=limits,
            other_machine=self._flag("other-machine"),
            other_key=self._flag("other-key"),
            record="`pytest --pipevault-golden-record`",
            again="`pytest --pipevault-golden-overwrite`",
            measure="tolerance= of pipevault_golden",
            allow_machine="--pipevault-golden-other-machine",
            allow_key="--pipevault-golden-other-key",
        )


@pytest.fixture
def pipevault_golden(request: pytest.FixtureRequest, tmp_path: Path) -> GoldenFixture:
    """Hold what a loaded pipeline drew to a golden next to the test file: pipevault_golden(output, "name")."""
    return GoldenFixture(request, tmp_path)


def _file_name(text: str) -> str:
    """Return ``text`` as a file name; where it has to change for that, with a digest that keeps two of them apart."""
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.")
    if safe == text and len(safe) <= 100:
        return safe
    return f"{safe[:90]}-{hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_LENGTH]}"
