"""Whatever local code reads by name counts by its value: containers, tensors, arrays and objects too."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from helpers.fresh_python import run_python
from helpers.tiny_models import Net
from pipevault.fingerprint.classes import class_identity, function_identity
from pipevault.fingerprint.model import architecture, describe_difference, snapshot

MODEL = """
import collections, dataclasses, decimal, enum, functools, logging, threading, types
from pathlib import Path
import numpy as np
import torch

logger = logging.getLogger(__name__)

class Settings:
    def __init__(self, gain):
        self.gain = gain

class Slots:
    __slots__ = ("gain",)
    def __init__(self, gain):
        self.gain = gain

@dataclasses.dataclass
class Data:
    gain: object

Pair = collections.namedtuple("Pair", "gain other")

def scaled(x, gain):
    return x * gain

class Holder:
    GAIN = {first_gain}

CONFIG = {value}

class Model(torch.nn.Module):
    def forward(self, x):
        logger.debug("called")
        return x * CONFIG
"""
VALUES = {
    "dict": "{'gain': GAIN}",
    "nested": "{'a': [{'b': (1, [GAIN])}]}",
    "list": "[GAIN]",
    "set": "{GAIN, 100, 'name'}",
    "tuple with a list": "(1, [GAIN])",
    "deque": "collections.deque([GAIN])",
    "default dict": "collections.defaultdict(list, gain=GAIN)",
    "mapping proxy": "types.MappingProxyType({'gain': GAIN})",
    "namespace": "types.SimpleNamespace(gain=GAIN)",
    "object": "Settings(GAIN)",
    "object in a dict": "{'settings': Settings([GAIN])}",
    "slots": "Slots(GAIN)",
    "dataclass": "Data(GAIN)",
    "named tuple": "Pair([GAIN], 1)",
    "tensor": "torch.full((2,), GAIN)",
    "array": "np.full(2, GAIN)",
    "array of objects": "np.array([{'gain': GAIN}], dtype=object)",
    "numpy scalar": "np.float32(GAIN)",
    "decimal": "decimal.Decimal(GAIN)",
    "module": "torch.nn.Linear(1, 1).requires_grad_(False).apply(lambda m: m.weight.fill_(GAIN) and m.bias.fill_(0))",
    "partial": "functools.partial(scaled, gain=GAIN)",
    "bound method": "{'gain': GAIN}.get",
    "lambda": "(lambda gain: lambda x: x * gain[0])([GAIN])",
    "class": "type('Made', (), {'TABLE': {'gain': GAIN}})",
    "hidden": "memoryview(bytes([GAIN]))",
}


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Writes a model that reads ``CONFIG`` into a folder of its own, and gives the module of it."""
    count = 0

    def write(value: str, **replaced: str) -> types.ModuleType:
        nonlocal count
        count += 1
        folder = tmp_path / str(count)
        folder.mkdir()
        text = MODEL.replace("{first_gain}", "1").replace("{value}", value)
        (folder / "model_with_values.py").write_text(text)
        sys.modules.pop("model_with_values", None)
        monkeypatch.syspath_prepend(folder)
        importlib.invalidate_caches()
        return importlib.import_module("model_with_values")

    yield write
    sys.modules.pop("model_with_values", None)


def digest(module: nn.Module) -> str:
    return str(architecture(module).digest)


@pytest.mark.parametrize("name", VALUES)
def test_value_that_forward_reads_counts(name: str, build: Callable[..., Any]) -> None:
    two, again, three = (digest(build(VALUES[name].replace("GAIN", gain)).Model()) for gain in ("2", "2", "3"))
    assert two == again
    assert two != three


@pytest.mark.parametrize("name", VALUES)
def test_address_of_a_value_does_not_count(name: str, build: Callable[..., Any]) -> None:
    module = build(VALUES[name].replace("GAIN", "2"))
    one = digest(module.Model())
    assert digest(module.Model()) == one


def test_digest_is_the_same_in_other_processes_and_folders(tmp_path: Path) -> None:
    values = ", ".join(value.replace("GAIN", "2") for name, value in VALUES.items() if name != "class")
    code = (
        "from model_with_values import Model; from pipevault.fingerprint.model import architecture;"
        "print(architecture(Model()).digest)"
    )
    seen = set()
    for seed in ("1", "2", "3"):
        folder = tmp_path / seed
        folder.mkdir()
        text = MODEL.replace("{first_gain}", "1").replace("{value}", f"[{values}, Path.cwd(), __file__]")
        (folder / "model_with_values.py").write_text(text)
        seen.add(run_python(code, cwd=folder, PYTHONHASHSEED=seed))
    assert len(seen) == 1


def test_value_changed_while_the_process_runs_counts_and_comes_back(build: Callable[..., Any]) -> None:
    module = build("{'gain': 2}")
    net = module.Model()
    before = digest(net)
    module.CONFIG["gain"] = 3
    assert digest(net) != before
    module.CONFIG["gain"] = 2
    assert digest(net) == before


def test_class_attribute_that_holds_a_container_counts(build: Callable[..., Any]) -> None:
    module = build("1")
    module.Model.table = {"gain": 1}
    before = digest(module.Model())
    module.Model.table["gain"] = 2
    readable = snapshot(module.Model())
    assert digest(module.Model()) != before
    module.Model.table["gain"] = 1
    text = describe_difference(snapshot(module.Model()), readable)
    assert text == "the part itself: the code of Model, or a value that it reads, changed"


def test_values_that_hold_themselves_end(build: Callable[..., Any]) -> None:
    module = build("[2]")
    module.CONFIG.append(module.CONFIG)
    module.CONFIG.append({"model": module.Model(), "class": module.Model})
    before = digest(module.Model())
    assert digest(module.Model()) == before
    module.CONFIG[0] = 3
    assert digest(module.Model()) != before


def test_very_deep_values_end(build: Callable[..., Any]) -> None:
    module = build("[2]")
    for _ in range(5000):
        module.CONFIG = [module.CONFIG]
    assert digest(module.Model()) == digest(module.Model())


class Shifting(nn.Module):
    """Reads a table in a method of a base class only."""

    table: Any

    def shift(self, x: Any) -> Any:
        return x + TABLE["shift"]


class Derived(Shifting):
    def forward(self, x: Any) -> Any:
        return self.shift(x)


TABLE = {"shift": 1}


def test_value_read_by_an_inherited_method_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(Derived())
    monkeypatch.setitem(TABLE, "shift", 2)
    assert digest(Derived()) != before


class Processor:
    def __call__(self, x: Any) -> Any:
        return self.step(x)

    def step(self, x: Any) -> Any:
        return x * TABLE["shift"]


def test_value_read_by_a_method_of_a_helper_object_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = class_identity(Processor)
    monkeypatch.setitem(TABLE, "shift", 2)
    assert class_identity(Processor) != before


def test_weights_of_the_tree_that_a_closure_reaches_do_not_count() -> None:
    def build() -> Any:
        net: Any = Net()
        net.act = lambda x: net.inner(x) * net.inner[0].weight
        return net

    assert digest(build()) == digest(build())


def test_wrapper_that_carries_a_released_name_counts_by_its_code() -> None:
    import functools

    def wrap(gain: float) -> Any:
        @functools.wraps(nn.functional.silu)
        def act(x: Any) -> Any:
            return x * gain

        return act

    assert function_identity(wrap(1.0)) == function_identity(wrap(1.0))
    assert len({function_identity(f) for f in (wrap(1.0), wrap(2.0), nn.functional.silu)}) == 3


@pytest.mark.parametrize("value", [b"1", range(1), complex(1), slice(1)])
def test_plain_values_on_a_module_count(value: Any) -> None:
    net: Any = Net()
    net.kind = value
    other: Any = Net()
    other.kind = type(value)(2) if not isinstance(value, bytes) else b"2"
    assert digest(net) != digest(other)
