"""Code outside released packages is part of the digest: classes, the helpers they call, the constants they read."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers.models.activations import GELU
from torch import nn

from pipevault.fingerprint.classes import class_identity, function_identity, is_released, qualified_name
from pipevault.fingerprint.model import architecture

SOURCE = """
import torch
import {helper_name} as helpers
from {helper_name} import double

FACTOR = 3
CACHE_FOLDER = "/home/someone"

class Base(torch.nn.Module):
    def shift(self, x):
        return x + 1

class Local(Base):
    mode = "fast"

    def forward(self, x):
        return self._inner(x) * FACTOR

    def _inner(self, x):
        return helpers.triple(double(self.shift(x)))

    def load(self):
        return CACHE_FOLDER, UNUSED

UNUSED = 1
"""
HELPERS = """
STEP = 2

def double(x):
    return x * STEP

def triple(x):
    return x * 3
"""

Load = Callable[..., types.ModuleType]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Writes the two files with one replacement each in a fresh folder, and imports them."""
    count = 0
    names: list[str] = []

    def load_with(old: str = "", new: str = "") -> types.ModuleType:
        nonlocal count
        count += 1
        folder = tmp_path / str(count)
        folder.mkdir()
        for name, text in (("local_net", SOURCE.format(helper_name="local_helpers")), ("local_helpers", HELPERS)):
            (folder / f"{name}.py").write_text(text.replace(old, new) if old else text)
            sys.modules.pop(name, None)
            names.append(name)
        monkeypatch.syspath_prepend(folder)
        importlib.invalidate_caches()
        return importlib.import_module("local_net")

    yield load_with
    for name in names:
        sys.modules.pop(name, None)


def digest(module: types.ModuleType) -> str:
    return str(architecture(module.Local()).digest)


def test_same_code_in_another_folder_has_the_same_digest(load: Load) -> None:
    assert digest(load()) == digest(load())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return self._inner(x) * FACTOR", "return self._inner(x) + FACTOR"),
        ("return x + 1", "return x + 2"),
        ("FACTOR = 3", "FACTOR = 4"),
        ('mode = "fast"', 'mode = "slow"'),
        ("return x * STEP", "return x + STEP"),
        ("return x * 3", "return x * 4"),
        ("STEP = 2", "STEP = 5"),
    ],
    ids=["forward", "base class", "constant", "class attribute", "helper", "helper module", "helper's constant"],
)
def test_edited_code_counts(load: Load, old: str, new: str) -> None:
    assert digest(load()) != digest(load(old, new))


@pytest.mark.parametrize(("old", "new"), [("/home/someone", "/home/other"), ("UNUSED = 1", "UNUSED = 2")])
def test_what_forward_does_not_reach_does_not_count(load: Load, old: str, new: str) -> None:
    assert digest(load()) == digest(load(old, new))


def test_a_constant_that_changes_while_the_process_runs_counts(load: Load) -> None:
    module = load()
    before = digest(module)
    module.FACTOR = 9  # type: ignore[attr-defined]
    changed = digest(module)
    module.FACTOR = 3  # type: ignore[attr-defined]
    module.Local.mode = "slow"
    assert before not in (changed, digest(module))
    module.Local.mode = "fast"
    assert digest(module) == before


def without_source(body: str) -> type[nn.Module]:
    space: dict[str, type[nn.Module]] = {}
    exec(f"import torch\nclass Typed(torch.nn.Module):\n    def forward(self, x):\n        {body}", space)
    cls = space["Typed"]
    cls.__module__ = "__main__"
    return cls


def test_class_without_source_counts_by_its_bytecode() -> None:
    one, same, other = (without_source(body) for body in ("return x + 1", "return x + 1", "return x + 2"))
    assert class_identity(one) == class_identity(same)
    assert class_identity(one) != class_identity(other)


def test_released_class_is_named_without_code() -> None:
    assert class_identity(nn.Linear) == "torch.nn.modules.linear.Linear"
    assert is_released("torch.nn.functional")
    assert is_released("collections.abc")
    assert not is_released("__main__")


def test_method_of_a_released_class_replaced_at_run_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = GELU(2, 2)
    before = architecture(layer).digest

    def forward(self: GELU, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states

    with monkeypatch.context() as patched:
        patched.setattr(GELU, "forward", forward)
        assert architecture(layer).digest != before
    assert architecture(layer).digest == before


def test_lambdas_differ_by_code_and_by_what_they_hold() -> None:
    def make(step: int) -> Callable[[int], int]:
        return lambda x: x + step

    assert function_identity(make(1)) == function_identity(make(1))
    assert function_identity(make(1)) != function_identity(make(2))
    assert function_identity(lambda x: x + 1) != function_identity(lambda x: x + 2)


def test_names_of_released_functions_carry_their_module() -> None:
    assert qualified_name(torch.nn.functional.silu) == "torch.nn.functional.silu"
    assert qualified_name(without_source) == "without_source"
