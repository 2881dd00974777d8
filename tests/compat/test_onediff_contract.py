"""What pipevault relies on in OneDiff: how a backend that is not registered is looked up, and how one is registered."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipevault.compat.onediff import announce_backend, register_backend


def in_new_process(code: str) -> str:
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_importing_pipevault_is_enough_and_imports_nothing_before_it_is_asked_for() -> None:
    printed = in_new_process(
        "import sys, pipevault\n"
        "print(sorted({'torch', 'onediff', 'pipevault.runtime'} & set(sys.modules)))\n"
        "from onediff.infer_compiler.backends import registry\n"
        "print('inductor' in registry._BACKENDS, 'pipevault.runtime' in sys.modules)\n"
        "print(registry.lookup_backend('inductor').__module__)\n"
    )
    assert printed.splitlines() == ["[]", "False False", "pipevault.runtime.by_hand"]


def test_an_unknown_backend_is_still_one() -> None:
    printed = in_new_process(
        "import pipevault\n"
        "from onediff.infer_compiler.backends import registry\n"
        "try: registry.lookup_backend('tensorrt')\n"
        "except ModuleNotFoundError as error: print(error.name)\n"
    )
    assert printed == "onediff.infer_compiler.backends.tensorrt"


def test_announcing_and_registering_twice_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    from onediff.infer_compiler.backends import registry

    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(registry, "_BACKENDS", {})
    finders = len(sys.meta_path)
    for _ in range(2):
        announce_backend("another", "pipevault.errors")
        register_backend("another", test_announcing_and_registering_twice_is_harmless)
    assert len(sys.meta_path) == finders + 1
    assert registry.lookup_backend("another") is test_announcing_and_registering_twice_is_harmless
