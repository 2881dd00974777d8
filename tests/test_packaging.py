"""What pyproject.toml, constraints.txt and the changelog say of one another."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import pipevault
from pipevault.compat.versions import OLDEST_TORCH

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT: dict[str, Any] = PYPROJECT["project"]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def direct_requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for text in [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]]


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def holds(requirement: Requirement, python: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"python_version": python, "extra": ""})


def torch_requirement() -> Requirement:
    [requirement] = [item for item in map(Requirement, PROJECT["dependencies"]) if item.name == "torch"]
    return requirement


def holds_here(requirement: Requirement) -> bool:
    return requirement.name != "torch" and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))


def metadata(name: str, version: str, requirements: Iterable[str] = ()) -> str:
    needs = [f"Requires-Dist: {requirement}" for requirement in requirements]
    return "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *needs, ""])


def write_facts(folder: Path, name: str, version: str) -> None:
    folder.mkdir()
    (folder / "METADATA").write_text(metadata(name, version))
    (folder / "RECORD").write_text("")


def write_wheel(folder: Path, name: str, version: str, requirements: Iterable[str] = ()) -> None:
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", metadata(name, version, requirements))
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


def planned(environment: Path, house: Path) -> dict[str, str]:
    """Name and version of each package that pip would install."""
    command = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "--isolated", "install"]
    options = ["--dry-run", "--quiet", "--report", "-", "--no-index", "--find-links", str(house), "pipevault"]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    result = subprocess.run(
        [*command, *options], env={**variables, "PIP_CONFIG_FILE": os.devnull}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    items = json.loads(result.stdout)["install"]
    return {item["metadata"]["name"]: item["metadata"]["version"] for item in items}


@pytest.mark.parametrize("python", PYTHONS)
def test_every_direct_dependency_is_pinned_once_within_its_range(python: str) -> None:
    pins = [pin for pin in constraints() if holds(pin, python)]
    names = [pin.name for pin in pins]
    assert len(set(names)) == len(names)
    versions = {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}
    for requirement in direct_requirements():
        if holds(requirement, python):
            assert requirement.specifier.contains(versions[requirement.name]), requirement.name


def test_torch_is_pinned_for_every_python() -> None:
    [pin] = [pin for pin in constraints() if pin.name == "torch"]
    assert (str(pin.specifier), pin.marker) == ("==2.13.0", None)


@pytest.mark.parametrize("version", ["2.9.1", "2.11.0", "2.13.0", "2.13.0+cpu", "2.15.0", "2.15.0+cu130", "3.0.0"])
def test_torch_has_a_lower_bound_alone(version: str) -> None:
    assert torch_requirement().specifier.contains(version)


@pytest.mark.parametrize("version", ["2.8.0", "2.8.2+cpu"])
def test_older_torch_is_refused(version: str) -> None:
    assert not torch_requirement().specifier.contains(version)


def test_the_oldest_torch_is_the_one_that_doctor_asks_for() -> None:
    [bound] = torch_requirement().specifier
    assert (bound.operator, bound.version) == (">=", ".".join(map(str, OLDEST_TORCH)))


@pytest.mark.parametrize("version", ["2.9.1", "2.11.0", "2.13.0", "2.15.0"])
def test_pip_keeps_the_torch_that_is_installed(version: str, tmp_path: Path) -> None:
    """pip plans with stub packages in an empty environment, so that it needs no network."""
    pytest.importorskip("pip")
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    [site] = environment.glob("lib/python*/site-packages")
    write_facts(site / f"torch-{version}.dist-info", "torch", version)
    house = tmp_path / "house"
    house.mkdir()
    for name in {requirement.name for requirement in direct_requirements()} - {"torch"}:
        write_wheel(house, name, "999")
    write_wheel(house, "torch", "2.99.0")
    write_wheel(house, "pipevault", pipevault.__version__, PROJECT["dependencies"])
    assert planned(environment, house) == {
        "pipevault": pipevault.__version__,
        **{item.name: "999" for item in map(Requirement, PROJECT["dependencies"]) if holds_here(item)},
    }


def test_pip_replaces_a_torch_that_is_too_old(tmp_path: Path) -> None:
    pytest.importorskip("pip")
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    [site] = environment.glob("lib/python*/site-packages")
    write_facts(site / "torch-2.8.0.dist-info", "torch", "2.8.0")
    write_wheel(tmp_path, "torch", "2.99.0")
    write_wheel(tmp_path, "pipevault", "1", [str(torch_requirement())])
    assert planned(environment, tmp_path) == {"pipevault": "1", "torch": "2.99.0"}


def test_the_oldest_python_is_the_one_that_the_setup_script_asks_for() -> None:
    [oldest] = SpecifierSet(PROJECT["requires-python"])
    script = (ROOT / "scripts" / "setup.sh").read_text("utf-8")
    assert f"({oldest.version.replace('.', ', ')})" in script


def test_one_version() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT
    source = (ROOT / PYPROJECT["tool"]["hatch"]["version"]["path"]).read_text("utf-8")
    assert re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE) == [pipevault.__version__]


def test_the_changelog_has_this_version_or_what_is_not_released() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert pipevault.__version__ in headings[:2]
    assert headings[0] in ("Unreleased", pipevault.__version__)


def test_urls_name_what_is_in_the_source() -> None:
    assert [path for path in PROJECT["urls"].values() if not (ROOT / path).is_file()] == []


def test_types_and_model_are_where_the_wheel_takes_them_from() -> None:
    package = Path(pipevault.__file__).parent
    assert (package / "py.typed").is_file()
    assert (package / "demo" / "model" / "model_index.json").is_file()
