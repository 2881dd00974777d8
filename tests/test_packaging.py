"""What pyproject.toml, constraints.txt and the changelog say of one another."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import pipevault

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def direct_requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for text in [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]]


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def holds(requirement: Requirement, python: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"python_version": python, "extra": ""})


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


def test_the_oldest_python_is_the_one_that_the_setup_script_asks_for() -> None:
    [oldest] = SpecifierSet(PROJECT["requires-python"])
    script = (ROOT / "scripts" / "setup.sh").read_text("utf-8")
    assert f"({oldest.version.replace('.', ', ')})" in script


def test_one_version() -> None:
    assert pipevault.__version__ == PROJECT["version"]


def test_the_changelog_has_this_version_or_what_is_not_released() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] in ("Unreleased", PROJECT["version"])


def test_types_and_model_are_where_the_wheel_takes_them_from() -> None:
    package = Path(pipevault.__file__).parent
    assert (package / "py.typed").is_file()
    assert (package / "demo" / "model" / "model_index.json").is_file()
