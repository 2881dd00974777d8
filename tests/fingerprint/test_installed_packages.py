"""Classes of an installed package have one identity wherever it lies; other code is identified by its source."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from helpers.fresh_python import SOURCE, run_python
from pipevault.fingerprint import names
from pipevault.fingerprint.names import is_released, place_in_package

CODE = """
import functools

GAIN = 2

class Layer:
    def __call__(self, x):
        return x * GAIN

def act(x):
    return x + GAIN

def wrap(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)
    return wrapper
"""
PRINT = """
import tiny_package.layers as layers, tiny_single, other_name
from pipevault.fingerprint.classes import class_identity, function_identity
from pipevault.fingerprint.names import place_in_package
def mine(x):
    return x
print(class_identity(layers.Layer), function_identity(layers.act), function_identity(tiny_single.act))
print(function_identity(other_name.act), place_in_package(layers.act), function_identity(layers.wrap(mine)))
"""


def install(
    folder: Path, *, facts: str = "tiny_package-1.0.dist-info", editable: bool = False, record: bool = True
) -> Path:
    """What ``pip install --target`` leaves, for a package, a single file, and a package of another name."""
    for name in ("tiny_package", "other_name"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "__init__.py").write_text("")
    (folder / "tiny_package" / "layers.py").write_text(CODE)
    (folder / "other_name" / "__init__.py").write_text(CODE)
    (folder / "tiny_single.py").write_text(CODE)
    for name, files in (
        (facts, ["tiny_package/__init__.py", "tiny_package/layers.py", "tiny_single.py"]),
        ("Other.Dist-2.0.dist-info", ["other_name/__init__.py"]),
    ):
        (folder / name).mkdir()
        (folder / name / ("METADATA" if name.endswith("dist-info") else "PKG-INFO")).write_text("Name: x\n")
        if record:
            lines = [f"{file},sha256=x,1" for file in (*files, f"{name}/RECORD")]
            (folder / name / "RECORD").write_text("\n".join(lines))
        if editable:
            text = json.dumps({"url": "file:///checkout", "dir_info": {"editable": True}})
            (folder / name / "direct_url.json").write_text(text)
    return folder


def printed(folder: Path) -> str:
    path = os.pathsep.join((str(SOURCE), str(folder)))
    return run_python(PRINT, cwd=folder.parent, PYTHONPATH=path)


def test_one_identity_in_site_packages_and_in_a_target_folder(tmp_path: Path) -> None:
    there = printed(install(tmp_path / "env" / "lib" / "site-packages"))
    assert there == printed(install(tmp_path / "target"))
    assert there == printed(install(tmp_path / "conda" / "lib" / "python3.11"))
    assert there.startswith("tiny_package.layers.Layer tiny_package.layers.act tiny_single.act\nother_name.act ")
    assert " tiny_package/layers.py:10:act " in there


def test_code_without_a_distribution_is_identified_by_its_source(tmp_path: Path) -> None:
    install(tmp_path / "code")
    for facts in (tmp_path / "code").glob("*.dist-info"):
        for file in facts.iterdir():
            file.unlink()
        facts.rmdir()
    first = printed(tmp_path / "code")
    assert first.startswith("Layer code:")
    layers = tmp_path / "code" / "tiny_package" / "layers.py"
    layers.write_text(CODE.replace("GAIN = 2", "GAIN = 3"))
    assert printed(tmp_path / "code") != first


@pytest.mark.parametrize("folder", ["checkout", "site-packages"])
def test_an_editable_installation_is_identified_by_its_source(folder: str, tmp_path: Path) -> None:
    assert printed(install(tmp_path / folder, editable=True)).startswith("Layer code:")


def test_an_egg_info_folder_beside_a_checkout_installs_nothing(tmp_path: Path) -> None:
    assert printed(install(tmp_path / "checkout", facts="tiny_package.egg-info")).startswith("Layer code:")
    there = printed(install(tmp_path / "dist-packages", facts="tiny_package-1.0.egg-info"))
    assert there.startswith("tiny_package.layers.Layer ")


def test_a_file_that_nobody_installed_is_local_though_it_lies_in_site_packages(tmp_path: Path) -> None:
    folder = install(tmp_path / "site-packages")
    (folder / "loose.py").write_text(CODE)
    code = "import loose; from pipevault.fingerprint.classes import class_identity as i; print(i(loose.Layer))"
    text = run_python(code, cwd=tmp_path, PYTHONPATH=os.pathsep.join((str(SOURCE), str(folder))))
    assert text.startswith("Layer code:")


def test_installed_packages_of_this_environment() -> None:
    import diffusers
    import numpy
    import PIL.Image
    import torch
    import transformers

    for module in (torch.nn.modules.linear, diffusers.models, transformers.utils, numpy.linalg, PIL.Image):
        assert is_released(module.__name__), module.__name__
    place = place_in_package(torch.nn.functional.gumbel_softmax)  # type: ignore[arg-type]
    assert (place or "").startswith("torch/nn/functional.py:")
    assert place_in_package(test_installed_packages_of_this_environment) is None  # type: ignore[arg-type]
    assert place_in_package(json.dumps) is None  # type: ignore[arg-type]


def test_an_alias_of_a_package_is_that_package() -> None:
    pytest.importorskip("requests")
    assert names.folder_of("requests.packages.urllib3") == names.folder_of("urllib3") is not None


def test_a_folder_that_cannot_be_read_holds_no_distribution(tmp_path: Path) -> None:
    assert list(names._distributions(str(tmp_path / "packages.zip"))) == []
    (tmp_path / "packages.zip").write_text("no archive")
    assert list(names._distributions(str(tmp_path / "packages.zip"))) == []


def test_files_that_are_no_text_say_nothing(tmp_path: Path) -> None:
    install(tmp_path)
    (tmp_path / "tiny_package-1.0.dist-info" / "RECORD").write_bytes(b"tiny_single.py,\xff\n")
    assert names._top_level_names(str(tmp_path)) == {"other_name"}


def test_packages_with_names_of_their_distributions_are_found_without_reading_the_others(tmp_path: Path) -> None:
    code = (
        "import torch, diffusers, transformers, peft, accelerate\n"
        "from pipevault.fingerprint import names\n"
        "found = [names.is_released(name) for name in ('torch', 'diffusers', 'transformers', 'peft', 'accelerate')]\n"
        "print(found, names._top_level_names.cache_info().misses)"
    )
    assert run_python(code, cwd=tmp_path) == f"{[True] * 5} 0"
